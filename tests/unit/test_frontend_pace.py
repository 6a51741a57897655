"""How long a line takes and a request holds its place, reckoned from those that ended lately."""

from __future__ import annotations

import pytest
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.admission.throughput import WINDOW_S, Pace

from tandem.clock import ManualClock


def test_nobody_knows_before_anything_has_ended() -> None:
    pace = Pace(ManualClock(1.0))
    assert pace.seconds(100) is None
    assert pace.held_s(QueuedRequest(tokens=10), 0.5) == 0.0


def test_the_line_moves_as_fast_as_places_were_given_back() -> None:
    clock = ManualClock(0.0)
    pace = Pace(clock)
    for _ in range(5):
        pace.note(QueuedRequest(tokens=50), 1.0)
        clock.advance(1.0)
    assert pace.seconds(100) == pytest.approx(100 * 5 / 250)


def test_what_ended_long_ago_is_forgotten() -> None:
    clock = ManualClock(0.0)
    pace = Pace(clock)
    pace.note(QueuedRequest(tokens=50), 9.0)
    clock.advance(WINDOW_S + 0.1)
    assert pace.seconds(100) is None
    assert pace.held_s(QueuedRequest(tokens=50), 0.5) == 0.0


def test_a_request_takes_as_long_as_others() -> None:
    pace = Pace(ManualClock(0.0))
    for held_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        pace.note(QueuedRequest(tokens=50), held_s)
    assert pace.held_s(QueuedRequest(tokens=50), 0.5) == 3.0
    assert pace.held_s(QueuedRequest(tokens=50), 1.0) == 5.0


def test_a_short_answer_takes_less() -> None:
    """Beside answers that take a minute it is not refused for a deadline of some seconds."""
    pace = Pace(ManualClock(0.0))
    for _ in range(5):
        pace.note(QueuedRequest(tokens=4_100, answer_tokens=4_000), 60.0)
    assert pace.held_s(QueuedRequest(tokens=110, answer_tokens=10), 0.5) == pytest.approx(0.15)
    assert pace.held_s(QueuedRequest(tokens=8_000, answer_tokens=8_000), 0.5) == 60.0
    assert pace.held_s(QueuedRequest(tokens=110), 0.5) == 60.0
