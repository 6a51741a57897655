"""How busy this process's event loop is: what share of a core its thread uses, and by how much it is late.

Measured while requests are open; an idle process measures nothing. What follows from it is for others to say:
`coalescing` holds chunks, `admission` refuses new requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

MEASURE_S = 0.1
"""How often."""
BUSY_FROM, BUSY_FULL = 0.15, 0.5
"""Share of a core that the loop's thread uses at a pressure of 0 and of 1."""
LAG_FROM_S, LAG_FULL_S = 0.003, 0.02
"""Lag at a pressure of 0 and of 1, however little the thread uses: others use its core."""
SMOOTHING = 0.5
"""Weight of the newest measurement."""


class LoopLoad:
    """Of one event loop."""

    def __init__(self, thread_time: Callable[[], float] = time.thread_time) -> None:
        """`thread_time` is the processor time of the thread that calls it, in seconds."""
        self._thread_time = thread_time
        self.pressure = 0.0
        """0: there is time for everything; 1: there is time for nothing more."""
        self.late_s = 0.0
        """By how much the loop is late again and again; a process that stood still once was late once."""
        self._busy = 0.0
        self._lag_s = 0.0
        self._last_lag_s = 0.0
        self._open_count = 0
        self._measuring: asyncio.TimerHandle | None = None
        self._measured_s = 0.0
        self._measured_thread_s = 0.0

    def open(self) -> None:
        """A request begins."""
        self._open_count += 1
        if self._measuring is None:
            loop = asyncio.get_running_loop()
            self._measured_s, self._measured_thread_s = loop.time(), self._thread_time()
            self._measuring = loop.call_later(MEASURE_S, self._measure)

    def close(self) -> None:
        """A request has ended."""
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
