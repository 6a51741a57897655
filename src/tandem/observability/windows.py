"""Sliding windows: latency percentiles and rates over the last seconds. Cheap to add to, bounded in memory.

Owns the arithmetic, not what is counted. A window is a ring of slices; expired slices are cleared on access, so that no
timer is needed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tandem.clock import Clock

FIRST_S = 10e-6
LAST_S = 1_000.0
GROWTH = 1.05
"""Ratio of consecutive buckets. A value is reported as the middle of its bucket: within 2.5 % of the true value."""
SCALE = 1 / math.log(GROWTH)
BUCKETS = math.ceil(math.log(LAST_S / FIRST_S) * SCALE)

LATENCY_WINDOW_S, LATENCY_SLICES = 60.0, 12
RATE_WINDOW_S, RATE_SLICES = 5.0, 10


@dataclass(frozen=True, slots=True)
class Latencies:
    """Percentiles of the values in a window."""

    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bucket counts of a window; those of several windows can be summed."""

    counts: tuple[int, ...]
    """One per bucket; empty: no values."""
    longest_s: float

    def latencies(self) -> Latencies | None:
        """Percentiles; None: no values."""
        total, longest_s = sum(self.counts), self.longest_s
        if not total:
            return None
        p50_s, p90_s, p99_s = (min(_quantile(self.counts, total * part), longest_s) for part in (0.5, 0.9, 0.99))
        return Latencies(total, p50_s, p90_s, p99_s, longest_s)


def added(histograms: Sequence[Histogram]) -> Histogram:
    """Sum of histograms."""
    counts = [histogram.counts for histogram in histograms if histogram.counts]
    longest_s = max((histogram.longest_s for histogram in histograms), default=0.0)
    return Histogram(tuple(sum(column) for column in zip(*counts, strict=True)), longest_s)


class _Slices:
    """Tracks the current slice of a ring and the slices that have expired."""

    def __init__(self, clock: Clock, window_s: float, count: int) -> None:
        self._clock = clock
        self._slice_s = window_s / count
        self._count = count
        self._number = int(clock() / self._slice_s)

    def turn(self) -> tuple[int, range]:
        """(index of the current slice, numbers of the slices to clear first)."""
        number = int(self._clock() / self._slice_s)
        passed = range(max(self._number, number - self._count) + 1, number + 1)
        self._number = max(number, self._number)
        return self._number % self._count, passed


class LatencyWindow:
    """Percentiles over the last minute, from buckets that grow by 5 %.

    One value costs under a microsecond, the whole window about 40 KB however much is added. Values below 10 µs or over
    1,000 s count in the first or last bucket; `longest_s` is exact. The window reaches back 55 to 60 s.
    """

    def __init__(self, clock: Clock, window_s: float = LATENCY_WINDOW_S, slices: int = LATENCY_SLICES) -> None:
        self._slices = _Slices(clock, window_s, slices)
        self._counts = [array("L", bytes(8 * BUCKETS)) for _ in range(slices)]
        self._longest_s = [0.0] * slices

    def add(self, latency_s: float, count: int = 1) -> None:
        """Add a latency `count` times."""
        index = self._current_slice()
        bucket = int(math.log(latency_s / FIRST_S) * SCALE) if latency_s > FIRST_S else 0
        self._counts[index][min(bucket, BUCKETS - 1)] += count
        if latency_s > self._longest_s[index]:
            self._longest_s[index] = latency_s

    def add_all(self, latencies_s: Iterable[float]) -> None:
        """Add many latencies of this moment, at a third of the cost each."""
        index = self._current_slice()
        counts, longest_s, log, last = self._counts[index], self._longest_s[index], math.log, BUCKETS - 1
        for latency_s in latencies_s:
            bucket = int(log(latency_s / FIRST_S) * SCALE) if latency_s > FIRST_S else 0
            counts[bucket if bucket < last else last] += 1
            if latency_s > longest_s:
                longest_s = latency_s
        self._longest_s[index] = longest_s

    def latencies(self) -> Latencies | None:
        """Percentiles of the window; None: no values."""
        return self.histogram().latencies()

    def histogram(self) -> Histogram:
        """Bucket counts of the window."""
        self._current_slice()
        counts = tuple(sum(column) for column in zip(*self._counts, strict=True))
        return Histogram(counts, max(self._longest_s))

    def _current_slice(self) -> int:
        current, passed = self._slices.turn()
        for number in passed:
            index = number % len(self._counts)
            self._counts[index] = array("L", bytes(8 * BUCKETS))
            self._longest_s[index] = 0.0
        return current


class RateWindow:
    """Rate per second over the last seconds."""

    def __init__(self, clock: Clock, window_s: float = RATE_WINDOW_S, slices: int = RATE_SLICES) -> None:
        self._slices = _Slices(clock, window_s, slices)
        self._counts = [0] * slices
        self._window_s = window_s
        self.total = 0
        """Sum of everything added so far."""

    def add(self, count: int) -> None:
        """Add to the count."""
        self._counts[self._current_slice()] += count
        self.total += count

    def per_s(self) -> float:
        """Sum of the window divided by its length."""
        self._current_slice()
        return sum(self._counts) / self._window_s

    def _current_slice(self) -> int:
        current, passed = self._slices.turn()
        for number in passed:
            self._counts[number % len(self._counts)] = 0
        return current


def _quantile(counts: Sequence[int], rank: float) -> float:
    """Middle of the bucket that contains the value of that rank."""
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= rank and count:
            return float(FIRST_S * GROWTH ** (bucket + 0.5))
    raise AssertionError("rank exceeds the count")
