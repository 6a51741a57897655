"""Restart limits and delays, on a manual clock."""

from __future__ import annotations

from tandem.clock import ManualClock
from tandem.service.restart_budget import RestartBudget, RestartPolicy


def test_pauses_double_and_end_after_five() -> None:
    budget = RestartBudget(RestartPolicy(), ManualClock())
    assert [budget.take_delay_s() for _ in range(7)] == [1, 2, 4, 8, 16, None, None]


def test_old_restarts_do_not_count() -> None:
    clock = ManualClock()
    budget = RestartBudget(RestartPolicy(), clock)
    assert [budget.take_delay_s() for _ in range(3)] == [1, 2, 4]
    clock.advance(601)
    assert [budget.take_delay_s() for _ in range(2)] == [1, 2]
    clock.advance(300)
    assert [budget.take_delay_s() for _ in range(4)] == [4, 8, 16, None]
    clock.advance(301)
    assert budget.take_delay_s() == 8
