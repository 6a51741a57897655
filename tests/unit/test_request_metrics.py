"""Request metrics: label values come from fields, not from messages."""

from __future__ import annotations

from typing import Any

from tandem.api.types.v1 import leg_pb2
from tandem.observability.request_metrics import RequestMetrics
from tandem.observability.request_trace import AttemptTrace, RequestTrace
from tests.unit.support.frontend_workers import decode, prefill


class Counted:
    """Keeps what is counted."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any] | None] = {}
        self.all: dict[str, list[tuple[float, dict[str, Any] | None]]] = {}

    def count(self, name: str, by: float = 1, attributes: dict[str, Any] | None = None) -> None:
        self.counts[name] = attributes
        self.all.setdefault(name, []).append((by, attributes))

    def record(self, name: str, value: float, attributes: dict[str, Any] | None = None) -> None:
        """Not looked at."""


def test_the_policy_is_the_one_that_chose() -> None:
    metrics: Any = Counted()
    attempt = AttemptTrace(policy="random", why="A sentence of any words", outcome="finished", end_s=1.0)
    RequestMetrics(metrics)(RequestTrace(begin_s=0.0, end_s=1.0, outcome="finished", attempts=[attempt]))
    assert metrics.counts["tandem.pairs.chosen"] == {"tandem.policy": "random", "tandem.route": "aggregated"}


def test_choices_are_counted_by_role_and_what_was_cached_beside_what_was_expected() -> None:
    finish = leg_pb2.LegFinish()
    finish.usage.cached_tokens = 96
    attempt = AttemptTrace(
        policy="prefix", expected_cached_tokens=128, prefill_worker=prefill(), decode_worker=decode(), end_s=1.0
    )
    attempt.end(finish, None)
    metrics: Any = Counted()
    RequestMetrics(metrics)(RequestTrace(begin_s=0.0, end_s=1.0, outcome="finished", attempts=[attempt]))
    about = {"tandem.policy": "prefix"}
    assert metrics.all["tandem.route.choices"] == [
        (1, {**about, "tandem.role": "prefill"}),
        (1, {**about, "tandem.role": "decode"}),
    ]
    assert metrics.all["tandem.route.cached_tokens"] == [(96, about)]
    assert metrics.all["tandem.route.expected_cached_tokens"] == [(128, about)]


def test_nothing_is_counted_as_expected_where_the_policy_does_not_know() -> None:
    attempt = AttemptTrace(policy="random", decode_worker=decode(), end_s=1.0)
    attempt.end(None, leg_pb2.LegFinish())
    metrics: Any = Counted()
    RequestMetrics(metrics)(RequestTrace(begin_s=0.0, end_s=1.0, outcome="finished", attempts=[attempt]))
    assert metrics.all["tandem.route.cached_tokens"] == [(0, {"tandem.policy": "random"})]
    assert "tandem.route.expected_cached_tokens" not in metrics.all
