"""Request traces: outcomes, retention, and sinks that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from tandem.api.types.v1 import leg_pb2
from tandem.clock import ManualClock
from tandem.domain.generation import EngineFinish, FinishReason
from tandem.errors import LegFailed, Overloaded
from tandem.observability.request_trace import GAPS_MAX, AttemptTrace, LegTrace, RequestTrace, kv_transfer_bytes
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import TraceStore, trace_ids


def test_a_failure_before_any_attempt_is_a_refusal() -> None:
    traces: TraceStore[RequestTrace] = TraceStore()
    with pytest.raises(Overloaded), traces.following(RequestTrace(request_id="r")):
        raise Overloaded("full")
    (trace,) = traces.closed
    assert (trace.outcome, trace.reason, trace.message) == ("refused", "OVERLOADED", "full")


def test_a_failure_after_dispatch_is_a_failure() -> None:
    traces: TraceStore[RequestTrace] = TraceStore()
    with pytest.raises(LegFailed), traces.following(RequestTrace(attempts=[AttemptTrace()])) as trace:
        raise LegFailed("broken")
    assert (trace.outcome, trace.reason) == ("failed", "LEG_FAILED")


def test_a_defect_is_a_failure_without_its_text() -> None:
    traces: TraceStore[RequestTrace] = TraceStore()
    with pytest.raises(ValueError, match="secret"), traces.following(RequestTrace(attempts=[AttemptTrace()])) as trace:
        raise ValueError("secret")
    assert (trace.outcome, trace.reason, trace.message) == ("failed", "INTERNAL", "ValueError")


async def test_a_client_that_disconnects_cancels_unless_it_has_its_finish() -> None:
    traces: TraceStore[RequestTrace] = TraceStore()

    async def stream(*, finished: bool) -> AsyncGenerator[int, None]:
        with traces.following(RequestTrace()) as trace:
            if finished:
                trace.finish("stop", 1, 1, 0)
            yield 1
            yield 2

    for finished in (False, True):
        async with aclosing(stream(finished=finished)) as numbers:
            async for _ in numbers:
                break
    assert [trace.outcome for trace in traces.closed] == ["cancelled", "finished"]
    assert not traces.open

    with pytest.raises(asyncio.CancelledError), traces.following(RequestTrace()):
        raise asyncio.CancelledError
    assert traces.closed[-1].outcome == "cancelled"


def test_a_failing_sink_does_not_affect_the_request(caplog: pytest.LogCaptureFixture) -> None:
    recorded: list[RequestTrace] = []

    def broken(trace: RequestTrace) -> None:
        raise RuntimeError("the sink is broken")

    traces: TraceStore[RequestTrace] = TraceStore([broken, recorded.append])
    with traces.following(RequestTrace()) as trace:
        trace.finish("stop", 1, 1, 0)
    assert recorded == [trace]
    assert "observer failed while recording" in caplog.text


def test_the_last_closed_traces_are_kept_beside_open_ones() -> None:
    traces: TraceStore[LegTrace] = TraceStore(closed_kept=2)
    for number in range(4):
        with traces.following(LegTrace(request_id=f"r{number % 2}", attempt=number)):
            pass
    with traces.following(LegTrace(request_id="r1", attempt=9)):
        assert [trace.attempt for trace in traces.open] == [9]
    assert len(traces.closed) == 2


def test_tokens_are_noted_with_their_times() -> None:
    clock = ManualClock(10.0)
    traces: TraceStore[RequestTrace] = TraceStore()
    with traces.following(RequestTrace(clock=clock)) as trace:
        for number, (now_s, count) in enumerate([(11.0, 1), (11.5, 2), (12.5, 1)]):
            if number != 1:
                trace.add_attempt(AttemptTrace(number=len(trace.attempts) + 1))
            trace.note_tokens(now_s, count)
        clock.advance(5)
        trace.finish("stop", 1, 4, 0)
    assert (trace.ttft_s, trace.token_count, list(trace.gaps_s)) == (1.0, 4, [0.5, 1.0])
    assert [(a.first_token_s, a.last_token_s) for a in trace.attempts] == [(11.0, 11.5), (12.5, 12.5)]
    assert (trace.begin_s, trace.end_s) == (10.0, 15.0)


def test_the_trace_of_a_long_stream_is_bounded() -> None:
    trace = RequestTrace()
    for number in range(GAPS_MAX * 2):
        trace.note_tokens(float(number), 1)
        trace.event("again")
    assert len(trace.gaps_s) == GAPS_MAX
    assert trace.token_count == GAPS_MAX * 2
    assert len(trace.events) < 100


def test_a_leg_has_the_outcome_of_its_engine() -> None:
    traces: TraceStore[LegTrace] = TraceStore()
    with traces.following(LegTrace()) as trace:
        trace.finish(EngineFinish(reason=FinishReason.LENGTH))
    assert (trace.outcome, trace.reason) == ("finished", "length")


def test_spans_are_made_only_where_they_are_exported() -> None:
    parent = TraceContext(7, 8)
    assert TraceStore[RequestTrace]().child(parent) is parent
    assert TraceStore[RequestTrace]().child(None) is None
    traces: TraceStore[RequestTrace] = TraceStore(ids=trace_ids(1.0))
    with traces.following(RequestTrace(parent=parent)) as trace:
        assert trace.span_context is not None
        assert (trace.span_context.trace_id, trace.span_context.span_id != 8) == (7, True)


def reported(moved_bytes: int | None) -> leg_pb2.LegFinish:
    return leg_pb2.LegFinish(timings=leg_pb2.LegTimings(kv_transfer_bytes=moved_bytes))


@pytest.mark.parametrize(
    ("prefill", "decode", "moved_bytes"),
    [
        (reported(4_096), reported(4_000), 4_000),
        (reported(4_096), reported(0), 0),
        (reported(4_096), reported(None), 4_096),
        (reported(4_096), None, 4_096),
        (None, reported(4_000), 4_000),
        (reported(None), reported(None), None),
        (None, None, None),
    ],
)
def test_kv_bytes_of_an_attempt_are_what_decode_received_else_what_prefill_sent(
    prefill: leg_pb2.LegFinish | None, decode: leg_pb2.LegFinish | None, moved_bytes: int | None
) -> None:
    assert kv_transfer_bytes(prefill, decode) == moved_bytes
    attempt = AttemptTrace()
    assert attempt.kv_transfer_bytes == 0, "nothing is known before the attempt ends"
    attempt.end(prefill, decode)
    assert attempt.kv_transfer_bytes == (moved_bytes or 0)
    assert RequestTrace(attempts=[attempt, attempt]).kv_transfer_bytes == 2 * (moved_bytes or 0)
