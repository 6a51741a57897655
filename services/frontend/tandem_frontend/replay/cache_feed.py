"""What the frontends learn of one engine's prefix cache: each change, some time after it happened.

Owns the delay and the order. In a serving fleet the worker's event stream does this; here no event is lost, because a
replay asks how well routing knows, not how it recovers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tandem.domain.worker import Start
from tandem_frontend.routing.prefix_index import PrefixIndex

Change = tuple[bool, tuple[int, ...]]
"""Whether blocks were stored (else removed), and their hashes."""


class CacheFeed:
    """Follows one pool, and passes its changes on to the indexes."""

    def __init__(self, start: Start, indexes: Sequence[PrefixIndex], delay_s: float) -> None:
        """`indexes` are those of all frontends."""
        self._start = start
        self._indexes = indexes
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._changes: list[Change] = []
        """Since the last delivery was planned."""

    def stored(self, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        """See `PageLog`."""
        self._add(True, tuple(block_hashes))

    def removed(self, block_hashes: Sequence[int]) -> None:
        """See `PageLog`."""
        self._add(False, tuple(block_hashes))

    def cleared(self) -> None:
        """See `PageLog`. No engine of a replay flushes its cache."""
        raise AssertionError("a replayed engine does not flush its cache")

    def _add(self, is_stored: bool, hashes: tuple[int, ...]) -> None:
        if not self._changes:
            # All changes of one step are delivered together, as one batch of events.
            self._loop.call_later(self._delay_s, self._deliver)
        self._changes.append((is_stored, hashes))

    def _deliver(self) -> None:
        changes, self._changes = self._changes, []
        for index in self._indexes:
            for is_stored, hashes in changes:
                if is_stored:
                    index.add(self._start, hashes)
                else:
                    index.remove(self._start, hashes)
