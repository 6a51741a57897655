"""What a worker counts when a leg closes."""

from __future__ import annotations

import pytest

from tandem.domain.generation import EngineFinish, FinishReason, KvCheck
from tandem.errors import KvCorrupt
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.metrics import Attributes, Metrics
from tandem.observability.request_trace import LegTrace

HANDOVERS = "tandem.kv.handovers"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Attributes]:
    """The attributes of the hand-overs counted so far."""
    counted: list[Attributes] = []

    def count(metrics: Metrics, name: str, amount: float = 1, attributes: Attributes | None = None) -> None:
        if name == HANDOVERS:
            assert amount == 1
            counted.append(attributes or {})

    monkeypatch.setattr(Metrics, "count", count)
    return counted


def closed(role: str = "decode") -> LegTrace:
    return LegTrace(role=role, begin_s=1.0, end_s=2.0)


def test_hand_overs_are_counted_by_the_check_of_their_kv(counted: list[Attributes]) -> None:
    sink = LegMetrics(Metrics())
    for check in (KvCheck.MATCHED, KvCheck.UNCHECKED, None):
        trace = closed()
        trace.finish(EngineFinish(reason=FinishReason.STOP, kv_check=check))
        sink(trace)
    trace = closed()
    trace.fail(KvCorrupt.reason, "the KV that arrived is not what the prefill engine sent")
    sink(trace)
    assert [attributes["tandem.kv.check"] for attributes in counted] == ["matched", "unchecked", "corrupt"]
