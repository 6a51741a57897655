"""Messages about the engine's prefix cache, from the port's types; and the log line where its events are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.domain.kv_blocks import HASH_RULE
from tandem.engine.port import Engine, KvEvent, KvSnapshot, KvUnknown
from tandem.errors import NotSupported

log = logging.getLogger(__name__)

SNAPSHOT_BLOCKS_MAX = 65_536
"""Of one message: 512 KiB of hashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Converts what one stream of WatchKvEvents reads."""

    epoch: Callable[[], int]
    """The worker's current one: it changes when the worker was paused, and the engine's cache stays."""
    block_size_tokens: int
    with_token_ids: bool

    def update(self, update: KvSnapshot | KvEvent | KvUnknown) -> Iterator[pb.WatchKvEventsResponse]:
        """The messages of one update: several of a snapshot, one of the others."""
        if isinstance(update, KvSnapshot):
            yield from self._snapshot(update)
        elif isinstance(update, KvUnknown):
            yield pb.WatchKvEventsResponse(sequence=update.sequence, unknown=pb.KvCacheUnknown())
        else:
            yield self._event(update)

    def _snapshot(self, snapshot: KvSnapshot) -> Iterator[pb.WatchKvEventsResponse]:
        sequence, hashes = snapshot.sequence, snapshot.block_hashes
        cache = pb.KvCacheDescription(
            epoch=self.epoch(),
            block_size_tokens=self.block_size_tokens,
            hash_rule=HASH_RULE,
            blocks=len(hashes),
        )
        yield pb.WatchKvEventsResponse(sequence=sequence, cache=cache)
        # An empty cache has one empty part: the client waits for the last one.
        for start in range(0, max(len(hashes), 1), SNAPSHOT_BLOCKS_MAX):
            end = start + SNAPSHOT_BLOCKS_MAX
            part = pb.KvSnapshot(block_hashes=hashes[start:end], is_last=end >= len(hashes))
            yield pb.WatchKvEventsResponse(sequence=sequence, snapshot=part)

    def _event(self, event: KvEvent) -> pb.WatchKvEventsResponse:
        response = pb.WatchKvEventsResponse(sequence=event.sequence)
        if event.kind == "stored":
            response.stored.CopyFrom(
                pb.KvBlocksStored(
                    block_hashes=event.block_hashes,
                    parent_block_hash=event.parent_block_hash,
                    token_ids=event.token_ids if self.with_token_ids else (),
                    block_size_tokens=event.block_size_tokens,
                )
            )
        elif event.kind == "removed":
            response.removed.CopyFrom(pb.KvBlocksRemoved(block_hashes=event.block_hashes))
        else:
            response.cleared.SetInParent()
        return response


async def log_refusal(engine: Engine, worker_id: str) -> None:
    """Log, once, that the engine's KV events are refused. Ends at once for an engine without KV events."""
    try:
        cache = engine.kv_cache()
    except NotSupported:
        return
    sentence = await cache.wait_refused()
    if sentence is not None:
        log.error(
            "worker %s: KV events of its engine are refused, and its cache stays unknown: %s", worker_id, sentence
        )
