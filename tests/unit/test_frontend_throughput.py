"""Queue waits and service times, estimated from requests that finished lately."""

from __future__ import annotations

import pytest
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.admission.throughput import WINDOW_S, Throughput

from tandem.clock import ManualClock


def test_there_is_no_estimate_before_a_request_has_finished() -> None:
    throughput = Throughput(ManualClock(1.0))
    assert throughput.wait_s(100) is None
    assert throughput.service_s(QueuedRequest(tokens=10), 0.5) == 0.0


def test_queue_wait_follows_the_rate_of_finished_tokens() -> None:
    clock = ManualClock(0.0)
    throughput = Throughput(clock)
    for _ in range(5):
        throughput.note(QueuedRequest(tokens=50), 1.0)
        clock.advance(1.0)
    assert throughput.wait_s(100) == pytest.approx(100 * 5 / 250)


@pytest.mark.parametrize(("count", "factor"), [(1, 3.0), (4, 2.0), (400, 1.1)])
def test_the_least_queue_wait_is_shorter_the_fewer_requests_have_finished(count: int, factor: float) -> None:
    throughput = Throughput(ManualClock(0.0))
    assert throughput.least_wait_s(100) is None
    for _ in range(count):
        throughput.note(QueuedRequest(tokens=50), 1.0)
    wait_s, least_s = throughput.wait_s(100), throughput.least_wait_s(100)
    assert wait_s is not None
    assert least_s is not None
    assert wait_s / least_s == pytest.approx(factor)


def test_requests_older_than_the_window_expire() -> None:
    clock = ManualClock(0.0)
    throughput = Throughput(clock)
    throughput.note(QueuedRequest(tokens=50), 9.0)
    clock.advance(WINDOW_S + 0.1)
    assert throughput.wait_s(100) is None
    assert throughput.service_s(QueuedRequest(tokens=50), 0.5) == 0.0


def test_service_time_is_a_quantile_of_recent_requests() -> None:
    throughput = Throughput(ManualClock(0.0))
    for service_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        throughput.note(QueuedRequest(tokens=50), service_s)
    assert throughput.service_s(QueuedRequest(tokens=50), 0.5) == 3.0
    assert throughput.service_s(QueuedRequest(tokens=50), 1.0) == 5.0


def test_a_short_completion_takes_less() -> None:
    """Among requests that take a minute, it is not rejected for a deadline of some seconds."""
    throughput = Throughput(ManualClock(0.0))
    for _ in range(5):
        throughput.note(QueuedRequest(tokens=4_100, answer_tokens=4_000), 60.0)
    assert throughput.service_s(QueuedRequest(tokens=110, answer_tokens=10), 0.5) == pytest.approx(0.15)
    assert throughput.service_s(QueuedRequest(tokens=8_000, answer_tokens=8_000), 0.5) == 60.0
    assert throughput.service_s(QueuedRequest(tokens=110), 0.5) == 60.0
