"""Lets rows run, in turn between batches, while live requests leave room, and stops some when live requests need it.

Owns the turns and the choice of rows that stop. How many may run is `admission.background`'s decision.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem_frontend.admission.background import BackgroundShare

TICK_S = 0.05
GRANTS_MAX = 4
"""Rows that begin at a time: the capacity that each of them takes is known only when it has been tokenised."""


@dataclass(slots=True)
class _Running:
    order: int
    stop_count: int
    """How often the row was stopped before."""


class RowGate:
    """The rows of all batches that this process runs."""

    def __init__(
        self, share: BackgroundShare, has_spare: Callable[[], bool], note_others: Callable[[], None] = lambda: None
    ) -> None:
        """`has_spare`: whether workers have capacity for one row more. `note_others`: called in each tick."""
        self._share = share
        self._has_spare = has_spare
        self._note_others = note_others
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._running: dict[asyncio.Task[Any], _Running] = {}
        self._count = 0
        """Rows that have a place, without those that are stopping."""
        self._order = 0
        share.on_excess = self._stop_excess

    @property
    def running_count(self) -> int:
        """Rows that have a place."""
        return self._count

    async def keep(self) -> None:
        """Give places that become free with time, or with the load of other frontends. Never returns."""
        while True:
            self._note_others()
            self._grant()
            await asyncio.sleep(TICK_S)

    async def turn(self) -> None:
        """Wait for a place. The first who waits gets the next one; `start` or `give_back` must follow."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._grant()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        """A place is not needed any more."""
        self._set_count(self._count - 1)
        self._grant()

    def start(self, task: asyncio.Task[Any], stop_count: int) -> None:
        """A task runs a row in the place until it ends; it may be cancelled. `stop_count`: how often the row was."""
        self._order += 1
        self._running[task] = _Running(self._order, stop_count)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        # A row that was stopped has given its place back then.
        if self._running.pop(task, None) is not None:
            self.give_back()

    def _grant(self) -> None:
        for _ in range(GRANTS_MAX):
            while self._waiters and self._waiters[0].done():
                self._waiters.popleft()
            if not self._waiters or self._share.room <= 0 or not self._has_spare():
                return
            self._waiters.popleft().set_result(None)
            self._set_count(self._count + 1)

    def _stop_excess(self) -> None:
        """Those that were stopped least often, of these the latest: a long row must not be stopped for ever."""
        order = sorted(self._running, key=lambda task: (self._running[task].stop_count, -self._running[task].order))
        stopped = order[: self._share.excess]
        for task in stopped:
            del self._running[task]
            task.cancel()
        self._set_count(self._count - len(stopped))

    def _set_count(self, count: int) -> None:
        self._count = count
        self._share.note_rows(count)
