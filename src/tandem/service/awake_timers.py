"""Timers on the time in which this process's event loop really ran: one wheel for all that waits for silence.

A loop that stood still for 3 s (a long callback, a stopped process, a machine without a free core) has read nothing of
what its peers sent meanwhile. Its own lag must not count as their silence. So one ticker measures the time between its
turns, and counts no more than `TICK_MAX_S` of it: bounds of silence are counted in ticks at which the loop could read.
Deadlines are moments of the caller's and keep to the real clock, but are judged only when what had already arrived has
been read: at a punctual tick, or at the second one after them. A timer costs a dictionary entry; nothing ticks while
there is none.
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
"""What one tick counts for at most, and up to which it is punctual."""


class Timer:
    """Something that will be called, unless it is cancelled before."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Call nothing. Harmless after the call, and twice."""
        self.callback = None


class AwakeTimers:
    """The timers of one event loop, which must run when the first of them is set."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake_s = 0.0
        self._tick_number = 0
        self._ticked_s = 0.0
        """When the last tick came, on the loop's clock."""
        self._slots: dict[int, list[Timer]] = {}
        self._deadlines: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._ticker: asyncio.TimerHandle | None = None
        self._is_ticking = False

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call after so much time in which the loop ran. `callback` must not raise or block."""
        self._run()
        timer = Timer(callback)
        # Outside of a tick, a part of the present one has passed already.
        number = self._tick_number + max(1, math.ceil(delay_s / TICK_S - 1e-9)) + (not self._is_ticking)
        self._slots.setdefault(number, []).append(timer)
        return timer

    def at(self, deadline_s: float, callback: Callable[[], None]) -> Timer:
        """Call when the loop's clock has passed a moment, and what came before it has been read."""
        self._run()
        timer = Timer(callback)
        heapq.heappush(self._deadlines, (deadline_s, next(self._numbers), timer))
        return timer

    @contextlib.asynccontextmanager
    async def within(self, delay_s: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, of time in which the loop ran.

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
        """Call nothing any more."""
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
            # From now, not from when this tick was due: after a lag, ticks must not come faster than the loop can read.
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
        # One timer's defect must not stop the ticker, and with it all others.
        log.exception("a timer's callback failed")
