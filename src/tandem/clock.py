"""Time as a dependency, so that leases, bounds and admission can be tested on a clock that does not run."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds."""

    def __call__(self) -> float:
        """Seconds from an arbitrary start; never goes back."""
        ...


monotonic: Clock = time.monotonic


def since_boot() -> float:
    """Monotonic seconds that also count while the machine sleeps, where the system provides them; for leases."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock_id)


def epoch_now() -> int:
    """The number of a start that begins now: grows with every start, as long as this machine's clock does."""
    return time.time_ns() // 1_000_000


class SteadyTime:
    """Time of day of related events: read once, and continued by the monotonic clock.

    A machine's clock that is set meanwhile changes neither the order of what happens nor how long it takes.
    """

    def __init__(self, wall: Clock = time.time, clock: Clock = monotonic) -> None:
        self._clock = clock
        self.begin_time_s = wall()
        """When it began, since the Unix epoch."""
        self._offset_s = self.begin_time_s - clock()

    def __call__(self) -> float:
        """Seconds since the Unix epoch."""
        return self._clock() + self._offset_s


class ManualClock:
    """A clock that moves only when a test moves it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The time it was set to."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
