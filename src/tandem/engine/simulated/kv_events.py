"""Log of prefix cache events (stored, removed, cleared), numbered contiguously, for any number of readers.

Keeps only the latest events; a reader of older ones sees a gap in the sequence numbers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from tandem.engine.port import KvEvent

KEPT_EVENTS_MAX = 4096


class KvEventLog:
    """Written by one pool, read by many."""

    def __init__(self, block_size_tokens: int, kept_max: int = KEPT_EVENTS_MAX) -> None:
        self._block_size_tokens = block_size_tokens
        self._events: deque[KvEvent] = deque(maxlen=kept_max)
        self._next_sequence = 1
        self._grown = asyncio.Event()

    def stored(self, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        """A chain of blocks, each the child of the previous one, was added to the cache."""
        self._add("stored", block_hashes, parent, token_ids)

    def removed(self, block_hash: int) -> None:
        """A block was evicted."""
        self._add("removed", (block_hash,), None, ())

    def cleared(self) -> None:
        """The whole cache was flushed."""
        self._add("cleared", (), None, ())

    async def read(self, from_sequence: int | None) -> AsyncIterator[KvEvent]:
        """Yield events from a sequence number on, or (None) from now on, without end."""
        sequence = self._next_sequence if from_sequence is None else from_sequence
        while True:
            for event in [e for e in self._events if e.sequence >= sequence]:
                sequence = event.sequence + 1
                yield event
            # A new Event per append, taken before the check below: no reader can miss an append between two waits.
            grown = self._grown
            if sequence >= self._next_sequence:
                await grown.wait()

    def _add(self, kind: str, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        self._events.append(
            KvEvent(
                sequence=self._next_sequence,
                kind=kind,
                block_hashes=tuple(block_hashes),
                parent_block_hash=parent,
                token_ids=tuple(token_ids),
                block_size_tokens=self._block_size_tokens,
            )
        )
        self._next_sequence += 1
        self._grown.set()
        self._grown = asyncio.Event()
