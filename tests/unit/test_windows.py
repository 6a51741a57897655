"""Sliding windows: accuracy, expiry and bounded memory."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.clock import ManualClock
from tandem.observability.windows import (
    BUCKETS,
    LATENCY_SLICES,
    LATENCY_WINDOW_S,
    RATE_WINDOW_S,
    LatencyWindow,
    RateWindow,
)

ERROR = 0.0251


@given(st.lists(st.floats(min_value=20e-6, max_value=900), min_size=1, max_size=300))
def test_percentiles_are_within_their_error(values: list[float]) -> None:
    window = LatencyWindow(ManualClock(5.0))
    for value in values:
        window.add(value)
    summary = window.latencies()
    assert summary is not None
    assert summary.count == len(values)
    assert summary.longest_s == max(values)
    for part, seen in ((0.5, summary.p50_s), (0.9, summary.p90_s), (0.99, summary.p99_s)):
        rank = next(r for r in range(1, len(values) + 1) if r >= len(values) * part)
        assert seen == pytest.approx(sorted(values)[rank - 1], rel=ERROR)


@given(st.lists(st.floats(min_value=0, max_value=5_000), max_size=100))
def test_many_at_once_count_as_one_by_one(values: list[float]) -> None:
    one_by_one, at_once = LatencyWindow(ManualClock(5.0)), LatencyWindow(ManualClock(5.0))
    for value in values:
        one_by_one.add(value)
    at_once.add_all(values)
    assert at_once.histogram() == one_by_one.histogram()


def test_values_older_than_the_window_are_dropped() -> None:
    clock = ManualClock(100.0)
    window = LatencyWindow(clock)
    window.add(8.0)
    clock.advance(LATENCY_WINDOW_S - LATENCY_WINDOW_S / LATENCY_SLICES)
    window.add(0.001)
    summary = window.latencies()
    assert summary is not None
    assert (summary.count, summary.longest_s) == (2, 8.0)
    clock.advance(LATENCY_WINDOW_S / LATENCY_SLICES)
    summary = window.latencies()
    assert summary is not None
    assert (summary.count, summary.longest_s) == (1, 0.001)
    clock.advance(10 * LATENCY_WINDOW_S)
    assert window.latencies() is None


def test_the_window_never_grows() -> None:
    clock = ManualClock()
    window = LatencyWindow(clock)

    def held_bytes() -> int:
        return sum(sys.getsizeof(counts) for counts in window._counts)

    rng = random.Random(1)
    before = held_bytes()
    for _ in range(5_000):
        clock.advance(rng.expovariate(10))
        window.add(rng.choice((0.0, 1e-9, rng.random(), 1e6)), rng.randint(1, 9))
    assert held_bytes() == before < LATENCY_SLICES * (BUCKETS * 8 + 400)


def test_a_rate_is_of_the_last_seconds() -> None:
    clock = ManualClock(3.3)
    rate = RateWindow(clock)
    assert rate.per_s() == 0
    for _ in range(20):
        rate.add(25)
        clock.advance(0.25)
    assert rate.per_s() == pytest.approx(100, rel=0.1)
    assert rate.total == 500
    clock.advance(RATE_WINDOW_S + 1)
    assert rate.per_s() == 0
    assert rate.total == 500
