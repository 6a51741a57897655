"""How busy the event loop of this process is: the share of a core that its thread uses, and its lag.

Measured only while requests are open. The users of the result: `coalescing` delays chunks, `admission` rejects new
requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

MEASURE_S = 0.1
"""Interval of measurements."""
BUSY_FROM, BUSY_FULL = 0.1, 0.25
"""Share of a core used by the loop's thread at which the pressure is 0, and 1."""
LAG_FROM_S, LAG_FULL_S = 0.003, 0.02
"""Lag at which the pressure is 0, and 1, whatever the thread's share: other processes may use its core."""
SMOOTHING = 0.5
"""Weight of the newest measurement."""


class LoopLoad:
    """Load of one event loop."""

    def __init__(self, thread_time: Callable[[], float] = time.thread_time) -> None:
        """`thread_time` returns the CPU time of the calling thread, in seconds."""
        self._thread_time = thread_time
        self.pressure = 0.0
        """0: not loaded; 1: saturated."""
        self.late_s = 0.0
        """Lag in seconds that lasts: the smaller of the last two measurements, so that a single pause does not count.
        """
        self._busy = 0.0
        self._lag_s = 0.0
        self._last_lag_s = 0.0
        self._open_count = 0
        self._measuring: asyncio.TimerHandle | None = None
        self._measured_s = 0.0
        self._measured_thread_s = 0.0

    def open(self) -> None:
        """Count a request that begins."""
        self._open_count += 1
        if self._measuring is None:
            loop = asyncio.get_running_loop()
            self._measured_s, self._measured_thread_s = loop.time(), self._thread_time()
            self._measuring = loop.call_later(MEASURE_S, self._measure)

    def close(self) -> None:
        """Count a request that has ended."""
        self._open_count -= 1

    def _measure(self) -> None:
        loop = asyncio.get_running_loop()
        now_s, thread_s = loop.time(), self._thread_time()
        elapsed_s = now_s - self._measured_s
        busy = (thread_s - self._measured_thread_s) / max(elapsed_s, 1e-6)
        lag_s = max(0.0, elapsed_s - MEASURE_S)
        self._measured_s, self._measured_thread_s = now_s, thread_s
        self._busy += SMOOTHING * (busy - self._busy)
        self._lag_s += SMOOTHING * (lag_s - self._lag_s)
        self.late_s, self._last_lag_s = min(lag_s, self._last_lag_s), lag_s
        by_use = (self._busy - BUSY_FROM) / (BUSY_FULL - BUSY_FROM)
        by_lag = (self._lag_s - LAG_FROM_S) / (LAG_FULL_S - LAG_FROM_S)
        self.pressure = min(1.0, max(0.0, by_use, by_lag))
        if self._open_count:
            self._measuring = loop.call_later(MEASURE_S, self._measure)
        else:
            self._measuring = None
            self._busy = self._lag_s = self._last_lag_s = self.late_s = self.pressure = 0.0
