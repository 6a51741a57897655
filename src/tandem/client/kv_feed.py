"""What one stream of cache events means: checks each message, and applies it to an index of cached blocks.

Owns the order of a stream: description, snapshot, then events without a gap. Knows no connection; `kv_watch` reads the
stream, and opens another one where this one cannot be followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Protocol

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.domain.kv_blocks import HASH_RULE
from tandem.domain.worker import Start, Worker

SLICE_BLOCKS = 1_024
"""Blocks applied at once, in 1 to 3 ms; between slices the event loop runs what waits."""
BLOCK_TOKENS_MAX = 2**20


class CacheIndex(Protocol):
    """What a feed writes to: the frontend's `PrefixIndex`, whose words these are."""

    def reset(self, start: Start, block_size_tokens: int) -> None:
        """A snapshot begins."""
        ...

    def complete(self, start: Start) -> None:
        """The snapshot has ended."""
        ...

    def add(self, start: Start, hashes: Sequence[int]) -> None:
        """Blocks were stored."""
        ...

    def remove(self, start: Start, hashes: Sequence[int]) -> None:
        """Blocks were removed."""
        ...

    def clear(self, start: Start) -> None:
        """All blocks were removed."""
        ...

    def suspect(self, start: Start) -> None:
        """No credit until the next snapshot."""
        ...

    def drop(self, start: Start) -> None:
        """Forget a worker."""
        ...

    def is_trusted(self, start: Start) -> bool:
        """Whether a worker is credited."""
        ...

    def is_followed(self, start: Start) -> bool:
        """Whether changes are applied."""
        ...

    def sweep(self) -> bool:
        """Free a part of what is not needed any more; returns whether there is more."""
        ...

    def has_room(self, blocks_count: int) -> bool:
        """Whether so many more blocks fit."""
        ...


class FeedBroken(Exception):
    """The stream cannot be followed further; another one, from a snapshot, can."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why
        """A value of `tandem.reason` of the metric `tandem.prefix.suspicions`."""


class FeedRefused(Exception):
    """This worker's events mean something that this release does not know: no other stream would help."""


class KvFeed:
    """Applies one stream of one worker. To be discarded after an exception."""

    def __init__(self, worker: Worker, index: CacheIndex) -> None:
        self._worker = worker
        self._start = worker.start
        self._index = index
        self._last: int | None = None
        """Sequence of the last event; None: no message has arrived."""
        self._block_size_tokens = 0
        self._missing: int | None = None
        """Blocks of the snapshot that have not arrived; None: no snapshot is under way."""
        self._is_unknown = True
        """Whether events are skipped until the next description."""

    @property
    def is_begun(self) -> bool:
        """Whether the index is being written: from a description on, until the contents are unknown."""
        return not self._is_unknown

    @property
    def is_current(self) -> bool:
        """Whether the index has the worker's cache as of the last message."""
        return not self._is_unknown and self._missing is None

    async def apply(self, message: pb.WatchKvEventsResponse) -> None:
        """Apply one message, in slices if it is large.

        Raises:
            FeedBroken: messages are missing, or come in a wrong order; another start of the worker answers.
            FeedRefused: unknown hash rule, wrong block size.
        """
        kind = message.WhichOneof("event")
        if kind == "cache":
            self._begin(message.sequence, message.cache)
        elif kind == "unknown":
            self._last, self._is_unknown, self._missing = message.sequence, True, None
            self._index.suspect(self._start)
        elif kind == "snapshot":
            await self._load(message.sequence, message.snapshot)
        else:
            await self._change(kind, message)

    def _begin(self, sequence: int, cache: pb.KvCacheDescription) -> None:
        if cache.epoch != self._worker.epoch:
            raise FeedBroken("epoch", f"epoch {cache.epoch} answers instead of {self._worker.epoch}")
        if cache.hash_rule != HASH_RULE:
            raise FeedRefused(f"hash_rule is {cache.hash_rule!r}, this frontend knows {HASH_RULE}")
        if not 0 < cache.block_size_tokens <= BLOCK_TOKENS_MAX:
            raise FeedRefused(f"block_size_tokens is {cache.block_size_tokens}, must be 1 to {BLOCK_TOKENS_MAX}")
        self._last, self._is_unknown, self._missing = sequence, False, cache.blocks
        self._block_size_tokens = cache.block_size_tokens
        self._index.reset(self._start, cache.block_size_tokens)

    async def _load(self, sequence: int, snapshot: pb.KvSnapshot) -> None:
        if self._is_unknown and self._last is not None:
            return
        if self._missing is None or sequence != self._last:
            raise FeedBroken("gap", f"a part of a snapshot at event {sequence}, after event {self._last}")
        self._missing -= len(snapshot.block_hashes)
        await self._add(snapshot.block_hashes)
        if not snapshot.is_last:
            return
        if self._missing:
            raise FeedBroken("gap", f"a snapshot ended with {self._missing} blocks missing")
        self._missing = None
        self._index.complete(self._start)

    async def _change(self, kind: str | None, message: pb.WatchKvEventsResponse) -> None:
        if self._last is None or self._missing is not None or message.sequence != self._last + 1:
            raise FeedBroken("gap", f"event {message.sequence} came after event {self._last}")
        self._last = message.sequence
        if self._is_unknown:
            return
        if kind == "stored":
            if message.stored.block_size_tokens != self._block_size_tokens:
                raise FeedRefused(
                    f"block_size_tokens of an event is {message.stored.block_size_tokens}, that of the cache "
                    f"{self._block_size_tokens}"
                )
            await self._add(message.stored.block_hashes)
        elif kind == "removed":
            await self._remove(message.removed.block_hashes)
        elif kind == "cleared":
            self._index.clear(self._start)
        else:
            raise FeedBroken("gap", f"event {message.sequence} is of a kind that this release does not know")

    async def _add(self, hashes: Sequence[int]) -> None:
        for begin in range(0, len(hashes), SLICE_BLOCKS):
            if begin:
                await asyncio.sleep(0)
            self._index.add(self._start, hashes[begin : begin + SLICE_BLOCKS])

    async def _remove(self, hashes: Sequence[int]) -> None:
        """From the last slice to the first: a block never outlives its parent, as an index may assume."""
        for begin in _begins(len(hashes)):
            self._index.remove(self._start, hashes[begin : begin + SLICE_BLOCKS])
            if begin:
                await asyncio.sleep(0)


def _begins(count: int) -> Iterator[int]:
    return reversed(range(0, count, SLICE_BLOCKS))
