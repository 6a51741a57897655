"""Spans of a closed trace: names, parents, attributes, and their OTLP encoding."""

from __future__ import annotations

import itertools

import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from tandem.api.types.v1 import leg_pb2
from tandem.domain.generation import EngineFinish, EngineTimings, FinishReason
from tandem.errors import LegFailed
from tandem.observability.otlp import Encoder
from tandem.observability.request_trace import AttemptTrace, LegTrace, RequestTrace
from tandem.observability.spans import Span, is_sampled, spans_of
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import TraceStore, trace_ids
from tests.unit.support.frontend_workers import decode, prefill

PARENT = TraceContext(7, 8, state="v=1")


def spans(trace: RequestTrace | LegTrace) -> list[Span]:
    numbers = itertools.count(1000)
    return spans_of(trace, lambda: next(numbers))


def finished() -> RequestTrace:
    traces: TraceStore[RequestTrace] = TraceStore(ids=trace_ids(1.0))
    with traces.following(RequestTrace(request_id="r", model="m", parent=PARENT)) as trace:
        for name in ("tokenise", "admit", "wait", "route"):
            trace.step(name, trace.clock())
        first = trace.add_attempt(
            AttemptTrace(
                span_context=traces.child(trace.span_context),
                begin_s=trace.clock(),
                prefill_worker=prefill(),
                decode_worker=decode(),
            )
        )
        first.accepted("prefill")
        first.broke("decode", decode(), "decoding", "LEG_FAILED")
        first.end(None, None)
        trace.step("route", trace.clock())
        second = trace.add_attempt(
            AttemptTrace(
                number=2,
                span_context=traces.child(trace.span_context),
                begin_s=trace.clock(),
                tokens_before=3,
                prefill_worker=prefill(),
                decode_worker=decode(),
            )
        )
        second.accepted("prefill")
        second.accepted("decode")
        trace.note_tokens(trace.clock(), 4)
        finish = leg_pb2.LegFinish()
        finish.timings.kv_transfer_bytes = 4096
        second.end(None, finish)
        trace.finish("stop", 9, 4, 0)
    return trace


def test_attempts_are_siblings_and_the_second_is_linked_to_the_first() -> None:
    found = spans(finished())
    root = found[0]
    assert (root.trace_id, root.parent_id, root.is_parent_remote, root.state) == (7, 8, True, "v=1")
    first, second = (span for span in found if span.name == "attempt")
    assert first.parent_id == second.parent_id == root.span_id
    assert second.links == [(first.span_id, {"tandem.continues": True})]
    assert (first.error, second.error) == ("LEG_FAILED", None)
    assert [span.name for span in found if span.parent_id == first.span_id] == [], "one leg was never accepted"
    assert [span.name for span in found if span.parent_id == second.span_id] == ["dispatch", "await first token"]
    assert root.attributes["tandem.kv_transfer_bytes"] == 4096
    routes = [span.attributes["tandem.attempt"] for span in found if span.name == "route"]
    assert routes == [1, 2]


def test_a_step_that_did_not_happen_has_no_span() -> None:
    timings = EngineTimings(queued_time_s=10.0, preallocation_end_time_s=11.0)
    with TraceStore[LegTrace](ids=trace_ids(1.0)).following(LegTrace(role="decode", begin_s=9.0)) as trace:
        trace.finish(EngineFinish(reason=FinishReason.ABORTED, timings=timings))
    assert [(span.name, span.begin_s, span.end_s) for span in spans(trace)[1:]] == [
        ("submit", 9.0, 10.0),
        ("pre-allocate", 10.0, 11.0),
    ]


def test_a_leg_that_failed_says_why_and_one_that_was_left_is_no_error() -> None:
    traces: TraceStore[LegTrace] = TraceStore(ids=trace_ids(1.0))
    failed = LegTrace(role="prefill")
    with pytest.raises(LegFailed), traces.following(failed):
        raise LegFailed("no peer came")
    with traces.following(LegTrace(role="prefill")) as left:
        pass
    assert spans(failed)[0].error == "no peer came"
    assert spans(left)[0].error is None


def test_the_wire_carries_all_of_it() -> None:
    trace = finished()
    request = Encoder({"service.name": "tandem-frontend"}).request([trace])
    (resource_spans,) = request.resource_spans
    assert resource_spans.resource.attributes[0].value.string_value == "tandem-frontend"
    root, *others = resource_spans.scope_spans[0].spans
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.trace_state) == (f"{7:032x}", f"{8:016x}", "v=1")
    assert root.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert root.flags & trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    assert [event.name for event in root.events] == ["first token"]
    broken, going_on = (span for span in others if span.name == "attempt")
    assert broken.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert going_on.links[0].span_id == broken.span_id
    assert going_on.links[0].attributes[0].value.bool_value is True
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in (root, *others))
    assert {span.trace_id for span in others} == {root.trace_id}


def test_an_unsampled_trace_has_no_spans() -> None:
    assert not is_sampled(RequestTrace())
    assert not is_sampled(RequestTrace(span_context=TraceContext(1, 2, False)))
    assert is_sampled(RequestTrace(span_context=TraceContext(1, 2)))
