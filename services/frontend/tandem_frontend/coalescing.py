"""When a chunk leaves: at once while this process has time, and with what follows while it has not.

A chunk costs the same whether it holds one token or ten. So while the event loop is idle enough, each token leaves as
it comes; the busier the loop is, the longer a stream's next chunk is held, up to a bound. A stream whose tokens are
further apart than that never waits. Owns the measure of the loop and the one timer of all held streams; what a chunk
holds is the relay's business, and however it is cut the text, tokens and log probabilities are the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

HOLD_MAX_S = 0.025
"""Default of the bound."""
MEASURE_S = 0.1
"""How often the loop is measured while streams are open."""
BUSY_FROM, BUSY_FULL = 0.15, 0.5
"""Share of a core that the loop's thread uses, from which chunks are held, and at which they are held for the bound."""
LAG_FROM_S, LAG_FULL_S = 0.003, 0.02
"""A loop that is so late on average holds chunks, however little it uses: others use its core."""
FLUSH_S = 0.005
"""Held chunks are looked at so often, all streams' together."""
SMOOTHING = 0.5
"""Weight of the newest measurement."""


class Held(Protocol):
    """A stream with a chunk that waits."""

    due_s: float
    """On the loop's clock."""

    def flush(self) -> None:
        """Send the chunk."""
        ...


class Coalescing:
    """Of one process."""

    def __init__(self, hold_max_s: float = HOLD_MAX_S, thread_time: Callable[[], float] = time.thread_time) -> None:
        """`hold_max_s` is the bound for requests that ask for none of their own; 0: no chunk is ever held."""
        self.hold_max_s = hold_max_s
        self._thread_time = thread_time
        self._pressure = 0.0
        """0: there is time; 1: chunks are held for the bound."""
        self._held: list[Held] = []
        self._open_count = 0
        self._measuring: asyncio.TimerHandle | None = None
        self._measured_s = 0.0
        self._measured_thread_s = 0.0
        self._busy = 0.0
        self._lag_s = 0.0
        self._is_flushing = False

    @property
    def pressure(self) -> float:
        """From 0 (each token leaves as it comes) to 1 (chunks are held for the bound)."""
        return self._pressure

    def open(self) -> None:
        """A stream begins. While any is open the loop is measured."""
        self._open_count += 1
        if self._measuring is None:
            loop = asyncio.get_running_loop()
            self._measured_s, self._measured_thread_s = loop.time(), self._thread_time()
            self._measuring = loop.call_later(MEASURE_S, self._measure)

    def close(self) -> None:
        """A stream has ended."""
        self._open_count -= 1

    def hold(self, stream: Held) -> None:
        """Flush a stream soon after its `due_s`."""
        self._held.append(stream)
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush_due)

    def _flush_due(self) -> None:
        loop = asyncio.get_running_loop()
        held, self._held = self._held, []
        # What becomes due before the next look leaves now: a bound is kept, not overrun.
        soon_s = loop.time() + FLUSH_S
        for stream in held:
            if stream.due_s <= soon_s:
                stream.flush()
            else:
                self._held.append(stream)
        self._is_flushing = bool(self._held)
        if self._is_flushing:
            loop.call_later(FLUSH_S, self._flush_due)

    def _measure(self) -> None:
        loop = asyncio.get_running_loop()
        now_s, thread_s = loop.time(), self._thread_time()
        elapsed_s = now_s - self._measured_s
        busy = (thread_s - self._measured_thread_s) / max(elapsed_s, 1e-6)
        lag_s = max(0.0, elapsed_s - MEASURE_S)
        self._measured_s, self._measured_thread_s = now_s, thread_s
        self._busy += SMOOTHING * (busy - self._busy)
        self._lag_s += SMOOTHING * (lag_s - self._lag_s)
        by_use = (self._busy - BUSY_FROM) / (BUSY_FULL - BUSY_FROM)
        by_lag = (self._lag_s - LAG_FROM_S) / (LAG_FULL_S - LAG_FROM_S)
        self._pressure = min(1.0, max(0.0, by_use, by_lag))
        if self._open_count:
            self._measuring = loop.call_later(MEASURE_S, self._measure)
        else:
            self._measuring, self._busy, self._lag_s, self._pressure = None, 0.0, 0.0, 0.0
