"""Timers that count only the time in which the event loop ran: one timer wheel for all timeouts of silent peers.

A loop that was blocked for 3 s (a long callback, a stopped process, no free core) has not read what its peers sent
meanwhile, so its own lag must not count as their silence. One ticker measures the time between its runs and counts at
most `TICK_MAX_S` of it: timeouts are counted in ticks at which the loop could read. Deadlines use the real clock, but
are checked only once data that had already arrived has been read: at a punctual tick, or at the second one after them.
A timer costs a dictionary entry; without timers there are no ticks.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
from collections.abc import AsyncIterator, Callable

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Resolution of all timers here."""
TICK_MAX_S = 0.1
"""Maximum time that one tick counts for; a tick after at most this time is punctual."""


class Timer:
    """A callback that will be called unless it is cancelled first."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Cancel the callback. Does nothing after the call, or the second time."""
        self.callback = None


class AwakeTimers:
    """The timers of one event loop, which must be running when the first timer is set."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake_s = 0.0
        self._tick_number = 0
        self._ticked_s = 0.0
        """Time of the last tick, on the loop's clock."""
        self._slots: dict[int, list[Timer]] = {}
        self._deadlines: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._ticker: asyncio.TimerHandle | None = None
        self._is_ticking = False

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` after `delay_s` of time in which the loop ran. `callback` must not raise or block."""
        self._run()
        timer = Timer(callback)
        # Outside of a tick, a part of the current tick interval has already passed.
        number = self._tick_number + max(1, math.ceil(delay_s / TICK_S - 1e-9)) + (not self._is_ticking)
        self._slots.setdefault(number, []).append(timer)
        return timer

    def at(self, deadline_s: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once the loop's clock has passed `deadline_s` and earlier data has been read."""
        self._run()
        timer = Timer(callback)
        heapq.heappush(self._deadlines, (deadline_s, next(self._numbers), timer))
        return timer

    @contextlib.asynccontextmanager
    async def within(self, delay_s: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, but of time in which the loop ran.

        Raises:
            TimeoutError: it took longer.
        """
        async with asyncio.timeout(None) as scope:
            timer = self.after(delay_s, lambda: scope.reschedule(0.0))
            try:
                yield
            finally:
                timer.cancel()

    def close(self) -> None:
        """Cancel all timers."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self._slots.clear()
        self._deadlines.clear()

    def _run(self) -> None:
        if self._ticker is None:
            self._loop = asyncio.get_running_loop()
            self._ticked_s = self._loop.time()
            self._ticker = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        assert self._loop is not None, "ticks come from the loop"
        now_s, before_s = self._loop.time(), self._ticked_s
        elapsed_s, self._ticked_s = now_s - before_s, now_s
        self._awake_s += min(elapsed_s, TICK_MAX_S)
        self._is_ticking = True
        while self._tick_number < int(self._awake_s / TICK_S + 1e-6):
            self._tick_number += 1
            for timer in self._slots.pop(self._tick_number, ()):
                _call(timer)
        judged_s = now_s if elapsed_s <= TICK_MAX_S else before_s
        while self._deadlines and self._deadlines[0][0] <= judged_s:
            _call(heapq.heappop(self._deadlines)[2])
        while self._deadlines and self._deadlines[0][2].callback is None:
            heapq.heappop(self._deadlines)
        self._is_ticking = False
        if self._slots or self._deadlines:
            # From now, not from when this tick was due: after a lag, ticks must not fire faster than the loop can read.
            self._ticker = self._loop.call_later(TICK_S, self._tick)
        else:
            self._ticker = None


def _call(timer: Timer) -> None:
    callback, timer.callback = timer.callback, None
    if callback is None:
        return
    try:
        callback()
    except Exception:
        # An exception of one callback must not stop the ticker, and with it all other timers.
        log.exception("bug in this process in a timer's callback; other timers run on")
