"""What the hops write into the record of a request, on scripted legs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from tandem_frontend.admin.stats import RequestStats
from tandem_frontend.admin.timeline import timeline_of
from tandem_frontend.call_context import Caller
from tandem_frontend.execution.link_leg import Logprobs
from tandem_frontend.execution.request_stream import ATTEMPTS_MAX
from tandem_frontend.execution.trace_recorder import Record, trace_of

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.cli.timeline import render
from tandem.errors import InvalidRequest, LegFailed, NotSupported, TandemError
from tandem.observability.request_trace import RequestTrace
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import TraceStore, trace_ids
from tests.unit.support.scripted_legs import Gathered
from tests.unit.test_frontend_continuation import KILLED, Fleet, leg


class Noted(Gathered):
    """A taker that notes its tokens, as the relay does."""

    def __init__(self, trace: RequestTrace) -> None:
        super().__init__()
        self._trace = trace

    def take(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        super().take(token_ids, logprobs)
        self._trace.note_tokens(self._trace.clock(), len(token_ids))


async def read(fleet: Fleet, record: Record) -> None:
    async with fleet.attempts.accepted(leg(), Noted(record.trace), None, record) as stream:
        await stream.run()


async def test_an_undisturbed_request_is_one_route_and_one_attempt() -> None:
    fleet, traces = Fleet(), TraceStore[RequestTrace]()
    with traces.following(RequestTrace()) as trace:
        await read(fleet, Record(trace))
        trace.finish("length", 3, 10, 0)
    assert [step.name for step in trace.steps] == ["route"]
    (attempt,) = trace.attempts
    (sent,) = fleet.sent
    assert attempt.decode_worker == sent.route.decode
    assert attempt.prefill_worker == sent.route.prefill
    assert attempt.room == sent.room
    assert (attempt.outcome, attempt.candidates_count) == ("finished", 8)
    assert "random among 8 of 8" in attempt.why
    assert attempt.prefill_finish is not None
    assert attempt.decode_finish is not None
    times = [attempt.begin_s, attempt.decode_accepted_s, attempt.first_token_s, attempt.last_token_s, attempt.end_s]
    assert times == sorted(time_s for time_s in times if time_s is not None)
    assert trace.token_count == 10


async def test_a_continued_stream_records_the_failed_worker_and_the_next_attempt() -> None:
    fleet, traces = Fleet(faults={1: (4, KILLED)}), TraceStore[RequestTrace](ids=trace_ids(1.0))
    with traces.following(RequestTrace()) as trace:
        await read(fleet, Record(trace, traces.child))
    first, second = trace.attempts
    assert (first.outcome, first.failed_leg, first.failed_worker) == ("broken", "decode", fleet.sent[0].route.decode)
    assert first.reason == KILLED.reason
    assert (second.outcome, second.tokens_before, second.failed_leg) == ("finished", 4, "")
    assert "tried" in second.why or "refused" in second.why
    assert first.span_context is not None
    assert second.span_context is not None
    assert trace.span_context is not None
    assert first.span_context.trace_id == second.span_context.trace_id == trace.span_context.trace_id
    assert len({first.span_context.span_id, second.span_context.span_id, trace.span_context.span_id}) == 3
    assert [headers[0][1].split("-")[2] for headers in fleet.headers] == [
        f"{attempt.span_context.span_id:016x}" for attempt in trace.attempts if attempt.span_context
    ]


async def test_a_request_that_fails_for_good_says_so() -> None:
    fleet, traces = Fleet(faults=dict.fromkeys(range(1, 9), (0, KILLED))), TraceStore[RequestTrace]()
    with pytest.raises(LegFailed), traces.following(RequestTrace()) as trace:
        await read(fleet, Record(trace))
    assert (trace.outcome, trace.reason) == ("failed", "LEG_FAILED")
    assert {attempt.outcome for attempt in trace.attempts} == {"broken"}
    assert len(trace.attempts) == ATTEMPTS_MAX


@pytest.mark.parametrize("problem", [InvalidRequest("guided.regex", "unusable"), NotSupported("no grammars here")])
async def test_a_request_that_an_engine_refuses_counts_as_refused_and_not_against_its_worker(
    problem: TandemError,
) -> None:
    fleet, traces = Fleet(faults={1: (0, problem)}), TraceStore[RequestTrace]()
    stats = RequestStats(traces)
    with pytest.raises(type(problem)), traces.following(RequestTrace()) as trace:
        await read(fleet, Record(trace))
    (attempt,) = trace.attempts
    assert (trace.outcome, attempt.outcome, attempt.failed_leg) == ("refused", "refused", "decode")
    assert stats.outcomes == {"refused": 1}
    assert not stats.leg_failures
    timeline = render(timeline_of(trace), "frontend-0")
    assert attempt.failed_worker is not None
    assert (
        f"leg on {attempt.failed_worker.worker_id} refused the request in phase bootstrapping: {problem.reason}"
        in timeline
    )


async def test_a_request_that_is_refused_after_its_first_token_has_failed_but_its_worker_has_not() -> None:
    fleet, traces = Fleet(faults={1: (4, InvalidRequest("guided.regex", "allows nothing more"))}), TraceStore()
    stats: RequestStats = RequestStats(traces)
    with pytest.raises(InvalidRequest), traces.following(RequestTrace()) as trace:
        await read(fleet, Record(trace))
    assert trace.outcome == "failed"
    assert not stats.leg_failures


def test_a_request_without_an_id_has_one_from_its_arrival_on() -> None:
    caller = Caller()
    assert trace_of(pb.GenerateRequest(request_id="mine"), caller, "m").request_id == "mine"
    for request in (pb.GenerateRequest(), pb.GenerateRequest(request_id="not an id")):
        assert re.fullmatch("[0-9a-f]{32}", trace_of(request, caller, "m").request_id)


async def test_the_callers_span_is_passed_on_where_nothing_is_exported() -> None:
    fleet, traces = Fleet(), TraceStore[RequestTrace]()
    with traces.following(RequestTrace(parent=TraceContext(7, 8, False, "v=1"))) as trace:
        await read(fleet, Record(trace, traces.child))
    assert dict(fleet.headers[0]) == {"traceparent": f"00-{7:032x}-{8:016x}-00", "tracestate": "v=1"}
