"""Request metrics: label values come from fields, not from messages."""

from __future__ import annotations

from typing import Any

from tandem.observability.request_metrics import RequestMetrics
from tandem.observability.request_trace import AttemptTrace, RequestTrace


class Counted:
    """Keeps what is counted."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any] | None] = {}

    def count(self, name: str, by: float = 1, attributes: dict[str, Any] | None = None) -> None:
        self.counts[name] = attributes

    def record(self, name: str, value: float, attributes: dict[str, Any] | None = None) -> None:
        """Not looked at."""


def test_the_policy_is_the_one_that_chose() -> None:
    metrics: Any = Counted()
    attempt = AttemptTrace(policy="random", why="A sentence of any words", outcome="finished", end_s=1.0)
    RequestMetrics(metrics, "m")(RequestTrace(begin_s=0.0, end_s=1.0, outcome="finished", attempts=[attempt]))
    assert metrics.counts["tandem.pairs.chosen"] == {"tandem.policy": "random", "tandem.route": "aggregated"}
