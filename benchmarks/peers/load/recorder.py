"""Records the clients' events with their times, so that any window can be evaluated afterwards.

Owns the statistics of one window of one process; `measurements.py` combines them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

from benchmarks.peers.measurements import quantile


class Recorder:
    """Times are of the monotonic clock, which all processes of a machine share."""

    def __init__(self) -> None:
        self._token_times = array("d")
        self._token_counts = array("l")
        self._gap_times = array("d")
        self._gaps_s = array("d")
        self._firsts: list[tuple[float, int, float]] = []
        self._ends: list[tuple[float, float]] = []
        self._failures: list[tuple[float, str]] = []
        self._counted, self._used = 0, 0
        self.failed = 0
        """Answers that broke or never began, since the beginning."""

    def first(self, at_s: float, serial: int, ttft_s: float) -> None:
        """The first tokens of an answer have come."""
        self._firsts.append((at_s, serial, ttft_s))

    def tokens(self, at_s: float, count: int) -> None:
        """Tokens have come."""
        self._token_times.append(at_s)
        self._token_counts.append(count)

    def gap(self, at_s: float, gap_s: float) -> None:
        """So long after the tokens of the same stream before. Tokens that came together have no gap between them."""
        self._gap_times.append(at_s)
        self._gaps_s.append(gap_s)

    def end(self, at_s: float, whole_s: float) -> None:
        """An answer is whole."""
        self._ends.append((at_s, whole_s))

    def failure(self, at_s: float, reason: str) -> None:
        """An answer broke, or never began."""
        self._failures.append((at_s, reason))
        self.failed += 1

    def usage(self, counted: int, used: int) -> None:
        """What was counted of a whole answer, and how many tokens it had: where texts do not separate them."""
        self._counted += counted
        self._used += used

    def window(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """What happened in it. Everything up to its end is forgotten."""

        def inside(at_s: float) -> bool:
            return begin_s <= at_s < end_s

        tokens = sum(count for at_s, count in zip(self._token_times, self._token_counts, strict=True) if inside(at_s))
        gaps_ms = sorted(1e3 * gap_s for at_s, gap_s in zip(self._gap_times, self._gaps_s, strict=True) if inside(at_s))
        if self._counted:
            tokens = round(tokens * self._used / self._counted)
        measurements = {
            "tokens": tokens,
            "messages": sum(map(inside, self._token_times)),
            "requests": sum(inside(at_s) for at_s, _ in self._ends),
            "whole_ms": sorted(1e3 * whole_s for at_s, whole_s in self._ends if inside(at_s)),
            "failures": dict(Counter(reason for at_s, reason in self._failures if inside(at_s))),
            "ttft_ms": [(serial, 1e3 * ttft_s) for at_s, serial, ttft_s in self._firsts if inside(at_s)],
            "gap_ms": {name: quantile(gaps_ms, part) for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        }
        self._forget(end_s)
        return measurements

    def _forget(self, end_s: float) -> None:
        for times, values in ((self._token_times, self._token_counts), (self._gap_times, self._gaps_s)):
            kept = [at for at, at_s in enumerate(times) if at_s >= end_s]
            begin = kept[0] if kept else len(times)
            del times[:begin]
            del values[:begin]
        self._firsts = [one for one in self._firsts if one[0] >= end_s]
        self._ends = [one for one in self._ends if one[0] >= end_s]
        self._failures = [one for one in self._failures if one[0] >= end_s]
