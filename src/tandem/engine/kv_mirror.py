"""A mirror of one engine's prefix cache: the hashes of its blocks, and the latest changes for any number of readers.

An adapter writes it, in the order of the engine's events; `lost` says that some are missing, `repaired` and `replace`
that the contents are known again. Readers share one log of bounded size and hold a place in it, so a slow reader costs
no memory: it falls behind the log, and reads the contents anew. Numbers of events are the mirror's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from tandem.engine.port import KvEvent, KvSnapshot, KvUnknown
from tandem.errors import InvalidRequest

KEPT_EVENTS_MAX = 4096
KEPT_NUMBERS_MAX = 2**20
"""Block hashes and token ids of all kept events together: some 60 MB where no block is still cached, else 10 MB."""
EVENT_BLOCKS_MAX = 8192
EVENT_TOKENS_MAX = 2**18
"""A longer chain becomes several events, so that each fits into one message."""


class KvCacheMirror:
    """Implements `KvCache`. All methods are called on one event loop."""

    def __init__(
        self, block_size_tokens: int, *, kept_max: int = KEPT_EVENTS_MAX, kept_numbers_max: int = KEPT_NUMBERS_MAX
    ) -> None:
        """The contents are known, and empty; `kept_max` and `kept_numbers_max` bound the log."""
        self._block_size_tokens = block_size_tokens
        self._kept_max = kept_max
        self._kept_numbers_max = kept_numbers_max
        self._blocks: set[int] = set()
        self._last = 0
        """Number of the last event; the log holds those from `_oldest` to it."""
        self._oldest = 1
        self._log: dict[int, KvEvent] = {}
        self._kept_numbers = 0
        self._known = True
        self._refusal: str | None = None
        self._has_ended = False
        self._changed = asyncio.Event()

    @property
    def block_size_tokens(self) -> int:
        """See the port."""
        return self._block_size_tokens

    @property
    def is_known(self) -> bool:
        """Whether no event is missing."""
        return self._known

    @property
    def sequence(self) -> int:
        """Number of the last event; 0: none."""
        return self._last

    def snapshot(self) -> KvSnapshot:
        """The contents now, as a copy: 8 bytes a block, and some 50 ms for a million."""
        return KvSnapshot(sequence=self._last, block_hashes=list(self._blocks))

    # --- The adapter's side

    def stored(self, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        """A chain of blocks, each the child of the previous one, was added to the cache."""
        self._blocks.update(block_hashes)
        size = self._block_size_tokens
        step = max(1, min(EVENT_BLOCKS_MAX, EVENT_TOKENS_MAX // size))
        for start in range(0, len(block_hashes), step):
            part = block_hashes[start : start + step]
            self._add("stored", part, parent, token_ids[start * size : (start + step) * size])
            parent = part[-1]

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Blocks were evicted; a block stands before those that continue it.

        Of several events the first has the last blocks: a reader must never hold a block without those before it.
        """
        self._blocks.difference_update(block_hashes)
        for start in reversed(range(0, len(block_hashes), EVENT_BLOCKS_MAX)):
            self._add("removed", block_hashes[start : start + EVENT_BLOCKS_MAX])

    def cleared(self) -> None:
        """The whole cache was flushed."""
        self._blocks.clear()
        self._add("cleared")

    def lost(self) -> None:
        """Events are missing: followers read that the contents are unknown. Later events still change them."""
        self._known = False
        # One number stands for the missing events, so that readers of events see a gap.
        self._skip()
        self._wake()

    def repaired(self) -> None:
        """The missing events were added after all: the contents are right again."""
        assert self._refusal is None, "a refused cache stays unknown"
        self._known = True
        self._wake()

    def replace(self, block_hashes: Iterable[int]) -> None:
        """These are the contents, whatever was missed."""
        self._blocks = set(block_hashes)
        self._skip()
        self.repaired()

    def refuse(self, sentence: str) -> None:
        """The contents stay unknown for good; `sentence` says why."""
        self._refusal = sentence
        self._blocks.clear()
        self.lost()

    def end(self) -> None:
        """The engine no longer has this cache: all readers come to their end. May be called twice."""
        self._has_ended = True
        self._wake()

    # --- The readers' side

    async def events(self, from_sequence: int | None) -> AsyncIterator[KvEvent]:
        """See the port."""
        if from_sequence is not None and from_sequence < self._oldest:
            raise InvalidRequest("from_sequence", f"{from_sequence} is no longer kept, only {self._oldest} and later")
        sequence = self._last + 1 if from_sequence is None else from_sequence
        while not self._has_ended:
            # Taken before the look at the log: an event that comes between the two wakes this reader.
            changed = self._changed
            sequence = max(sequence, self._oldest)
            if sequence > self._last:
                await changed.wait()
                continue
            yield self._log[sequence]
            sequence += 1

    async def follow(self) -> AsyncIterator[KvSnapshot | KvEvent | KvUnknown]:
        """See the port."""
        while not self._has_ended:
            if not self._known:
                yield KvUnknown(sequence=self._last)
                while not self._known and not self._has_ended:
                    await self._changed.wait()
                continue
            snapshot = self.snapshot()
            sequence = snapshot.sequence + 1
            yield snapshot
            # Behind the log's beginning, events are missing here: lost by the engine, or this reader was too slow.
            while sequence >= self._oldest and not self._has_ended:
                if sequence > self._last:
                    await self._changed.wait()
                    continue
                event = self._log[sequence]
                sequence += 1
                yield event

    async def wait_refused(self) -> str | None:
        """See the port."""
        while self._refusal is None and not self._has_ended:
            await self._changed.wait()
        return self._refusal

    # --- The log

    def _add(
        self, kind: str, block_hashes: Sequence[int] = (), parent: int | None = None, token_ids: Sequence[int] = ()
    ) -> None:
        self._last += 1
        self._log[self._last] = KvEvent(
            sequence=self._last,
            kind=kind,
            block_hashes=block_hashes,
            parent_block_hash=parent,
            token_ids=token_ids,
            block_size_tokens=self._block_size_tokens,
        )
        self._kept_numbers += len(block_hashes) + len(token_ids)
        while len(self._log) > self._kept_max or (self._kept_numbers > self._kept_numbers_max and len(self._log) > 1):
            dropped = self._log.pop(self._oldest)
            self._kept_numbers -= len(dropped.block_hashes) + len(dropped.token_ids)
            self._oldest += 1
        self._wake()

    def _skip(self) -> None:
        """Use up a number without an event, so that everyone who reads the log has to begin anew."""
        self._log.clear()
        self._kept_numbers = 0
        self._last += 1
        self._oldest = self._last + 1

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
