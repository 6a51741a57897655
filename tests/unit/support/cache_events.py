"""An engine's prefix cache with the events that a worker publishes of it, and a copy of it after each event."""

from __future__ import annotations

from collections.abc import Iterator

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.domain.kv_blocks import HASH_RULE
from tests.unit.support.prefix_trees import Prefix, PrefixTree


class PublishedCache:
    """The cache of one start of a worker, and its messages as of WatchKvEvents."""

    def __init__(self, block_size_tokens: int = 2, epoch: int = 7) -> None:
        self.tree = PrefixTree(block_size_tokens)
        self.epoch = epoch
        self.after: list[frozenset[Prefix]] = [frozenset()]
        """Contents by the sequence of the last event."""

    @property
    def sequence(self) -> int:
        return len(self.after) - 1

    def cached_tokens(self, tokens: Prefix, sequence: int) -> int:
        """Leading cached tokens as they were after an event."""
        past = PrefixTree(self.tree.block_size_tokens)
        past.held = set(self.after[sequence])
        return past.cached_tokens(tokens)

    def store(self, tokens: Prefix) -> pb.WatchKvEventsResponse:
        hashes = self.tree.store(tokens)
        stored = pb.KvBlocksStored(block_hashes=hashes, block_size_tokens=self.tree.block_size_tokens)
        return pb.WatchKvEventsResponse(sequence=self._next(), stored=stored)

    def evict(self, tokens: Prefix) -> pb.WatchKvEventsResponse:
        removed = pb.KvBlocksRemoved(block_hashes=self.tree.evict(tokens))
        return pb.WatchKvEventsResponse(sequence=self._next(), removed=removed)

    def clear(self) -> pb.WatchKvEventsResponse:
        self.tree.held.clear()
        return pb.WatchKvEventsResponse(sequence=self._next(), cleared=pb.KvCacheCleared())

    def unknown(self) -> pb.WatchKvEventsResponse:
        return pb.WatchKvEventsResponse(sequence=self.sequence, unknown=pb.KvCacheUnknown())

    def description(self, **fields: object) -> pb.WatchKvEventsResponse:
        """`fields` replace those of the description."""
        cache = pb.KvCacheDescription(
            epoch=self.epoch,
            block_size_tokens=self.tree.block_size_tokens,
            hash_rule=HASH_RULE,
            blocks=len(self.tree.held),
        )
        cache.MergeFrom(pb.KvCacheDescription(**fields))  # type: ignore[arg-type]
        return pb.WatchKvEventsResponse(sequence=self.sequence, cache=cache)

    def snapshot(self, part_blocks: int = 3) -> Iterator[pb.WatchKvEventsResponse]:
        """A description and the parts of a snapshot, in no order."""
        yield self.description()
        hashes = sorted(self.tree.hashes([*self.tree.held]))
        begins = range(0, len(hashes) or 1, part_blocks)
        for begin in begins:
            part = pb.KvSnapshot(block_hashes=hashes[begin : begin + part_blocks], is_last=begin == begins[-1])
            yield pb.WatchKvEventsResponse(sequence=self.sequence, snapshot=part)

    def _next(self) -> int:
        self.after.append(frozenset(self.tree.held))
        return self.sequence
