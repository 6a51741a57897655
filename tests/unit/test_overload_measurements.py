"""Statistics and verdicts of the overload benchmark, on loads with known results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks import leg_faults
from benchmarks.overload_load import Asked
from benchmarks.overload_measurements import Measurements, is_good, measurements_of, memory_growth_mib, missed

SECONDS, WARM_UP_S = 20.0, 10.0


def load(good_every_s: float = 0.5, refused_ms: float = 2.0, retry_delay_s: float | None = 1.0) -> list[Asked]:
    """A good request each so often, and as many that are refused."""
    asked = []
    for number in range(int(SECONDS / good_every_s)):
        start_s = number * good_every_s
        good = Asked(start_s, start_s, 5.0, start_s + 0.1, start_s + 0.2, "finished", None, 10)
        refused = Asked(start_s, start_s, 5.0, None, start_s + refused_ms / 1e3, "OVERLOADED", retry_delay_s, 0)
        asked += [good, refused]
    return asked


def measurements(asked: list[Asked]) -> Measurements:
    return measurements_of(asked, 4.0, WARM_UP_S, SECONDS)


def test_measurements_of_a_known_load() -> None:
    found = measurements(load())
    assert found.good_per_s == pytest.approx(2.0)
    assert found.asked_per_s == pytest.approx(4.0)
    assert found.refused_share == 0.5
    assert found.refusal_p99_ms == pytest.approx(2.0)
    assert found.refusals_without_retry_info == 0
    assert found.wasted_tokens_share == 0.0
    assert found.outcomes == {"finished": 20, "OVERLOADED": 20}


def test_an_answer_after_its_deadline_is_not_good() -> None:
    in_time = Asked(0, 0, 5.0, 1.0, 4.9, "finished", None, 10)
    assert is_good(in_time)
    assert not is_good(replace(in_time, end_s=5.1))
    assert not is_good(replace(in_time, outcome="DEADLINE_EXCEEDED"))
    late = [replace(in_time, start_s=12.0, end_s=18.0, outcome="DEADLINE_EXCEEDED")]
    assert measurements(late).wasted_tokens_share == 1.0
    assert measurements(late).late_share == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: load(), None),
        (lambda: load(good_every_s=0.6), "goodput"),
        (lambda: load(refused_ms=30.0), "refusals take"),
        (lambda: load(retry_delay_s=None), "without RetryInfo"),
    ],
    ids=["all met", "goodput", "refusals", "RetryInfo"],
)
def test_each_goal_can_be_missed(change: Callable[[], list[Asked]], words: str | None) -> None:
    problems = missed(2.0, {"4x": measurements(change())}, 0.0)
    assert [words] == [word for problem in problems for word in [words] if word and word in problem] or not words
    assert bool(problems) is bool(words)


def test_memory_that_grows_is_reported() -> None:
    flat = [(float(second), 100.0 + second % 3) for second in range(600)]
    assert abs(memory_growth_mib(flat, 120.0)) < 0.1
    growing = [(time_s, mib + time_s / 20) for time_s, mib in flat]
    growth_mib = memory_growth_mib(growing, 120.0)
    assert growth_mib == pytest.approx((570 - 120) / 20, rel=0.05)
    assert missed(1.0, {}, growth_mib)
    assert not missed(1.0, {}, None)


def test_the_goals_of_legs_are_judged() -> None:
    goals = {"median": 200.0, "most": 1_000.0}
    assert leg_faults.report([100.0, 150.0, 900.0], goals)["met"]
    assert not leg_faults.report([100.0, 150.0, 1_100.0], goals)["met"]
    assert not leg_faults.report([250.0, 250.0, 300.0], goals)["met"]
