"""Translates a request trace into a RequestTimeline: wall clock times, and offsets from the arrival of the request.

Owns the translation and what is exposed: a timeline contains no prompt, token or secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import duration_pb2

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.types.v1 import error_pb2, generation_pb2, leg_pb2
from tandem.domain.worker import Worker, WorkerRole
from tandem.observability.request_trace import CANCELLED, FAILED, FINISHED, REFUSED, AttemptTrace, RequestTrace
from tandem.observability.windows import Latencies
from tandem.rpc.convert import ROLES, placement_to_proto, timestamp

REASONS = frozenset(value.name for value in error_pb2.ErrorReason.DESCRIPTOR.values)
OUTCOMES = {
    "": pb.REQUEST_OUTCOME_OPEN,
    FINISHED: pb.REQUEST_OUTCOME_FINISHED,
    FAILED: pb.REQUEST_OUTCOME_FAILED,
    REFUSED: pb.REQUEST_OUTCOME_REFUSED,
    CANCELLED: pb.REQUEST_OUTCOME_CANCELLED,
}


def timeline_of(trace: RequestTrace) -> pb.RequestTimeline:
    """The timeline of a trace, finished or in progress."""
    timeline = pb.RequestTimeline(
        request_id=trace.request_id,
        call_id=trace.call_id,
        operation=trace.operation,
        model=trace.model,
        tenant=trace.tenant,
        outcome=outcome_of(trace),
        edge_begin=_moment(trace, trace.edge_begin_s),
        begin=_moment(trace, trace.begin_s),
        end=_moment(trace, trace.end_s),
        first_token=_moment(trace, trace.first_token_s),
        last_token=_moment(trace, trace.last_token_s),
        completion_tokens=trace.token_count,
        prompt_tokens=trace.prompt_tokens or None,
        steps=[
            pb.TimelineStep(
                name=step.name,
                begin=_moment(trace, step.begin_s),
                end=_moment(trace, step.end_s),
                attributes=_texts(step.attributes),
            )
            for step in trace.steps
        ],
        attempts=[_attempt(trace, attempt) for attempt in trace.attempts],
        events=[
            pb.TimelineEvent(at=_moment(trace, event.time_s), name=event.name, attributes=_texts(event.attributes))
            for event in trace.events
        ],
        trace_id="" if trace.span_context is None else f"{trace.span_context.trace_id:032x}",
        inter_token_latency=latency_figures(_latencies(trace.gaps_s)),
    )
    _add_ending(timeline, trace)
    return timeline


def summary_of(trace: RequestTrace, now_s: float) -> pb.RequestSummary:
    """An entry of the request list."""
    return pb.RequestSummary(
        request_id=trace.request_id,
        operation=trace.operation,
        outcome=outcome_of(trace),
        begin_time=timestamp(trace.begin_s),
        duration=duration((trace.end_s or now_s) - trace.begin_s),
        attempts=len(trace.attempts),
        completion_tokens=trace.token_count,
    )


def outcome_of(trace: RequestTrace) -> pb.RequestOutcome.ValueType:
    """Outcome; OPEN until the trace is closed, which is after the client has received the finish."""
    return OUTCOMES[trace.outcome if trace.end_s is not None else ""]


def duration(value_s: float) -> duration_pb2.Duration:
    """Seconds as a Duration, rounded to microseconds: doubles of wall clock times are not more precise."""
    message = duration_pb2.Duration()
    message.FromMicroseconds(round(value_s * 1e6))
    return message


def latency_figures(latencies: Latencies | None) -> pb.LatencyFigures | None:
    """Percentiles as a proto message."""
    if latencies is None:
        return None
    return pb.LatencyFigures(
        count=latencies.count,
        p50=duration(latencies.p50_s),
        p90=duration(latencies.p90_s),
        p99=duration(latencies.p99_s),
        longest=duration(latencies.longest_s),
    )


def reason_number(reason: str) -> error_pb2.ErrorReason.ValueType:
    """ErrorInfo reason as an ErrorReason; UNSPECIFIED if unknown."""
    name = f"ERROR_REASON_{reason}"
    return error_pb2.ErrorReason.Value(name if name in REASONS else "ERROR_REASON_UNSPECIFIED")


def _add_ending(timeline: pb.RequestTimeline, trace: RequestTrace) -> None:
    if trace.end_s is None:
        return
    if trace.outcome == FINISHED:
        timeline.finish_reason = generation_pb2.FinishReason.Value(f"FINISH_REASON_{trace.reason.upper()}")
        timeline.usage.CopyFrom(
            generation_pb2.Usage(
                prompt_tokens=trace.prompt_tokens,
                completion_tokens=trace.completion_tokens,
                cached_tokens=trace.cached_tokens,
            )
        )
        return
    number = reason_number(trace.reason)
    if number:
        timeline.error_reason = number
        timeline.error_message = trace.message


def _attempt(trace: RequestTrace, attempt: AttemptTrace) -> pb.TimelineAttempt:
    decode_role = WorkerRole.AGGREGATED if attempt.prefill_worker is None else WorkerRole.DECODE
    message = pb.TimelineAttempt(
        number=attempt.number,
        bootstrap_room=attempt.room,
        candidates=attempt.candidates_count or None,
        dispatched=_moment(trace, attempt.begin_s),
        first_token=_moment(trace, attempt.first_token_s),
        last_token=_moment(trace, attempt.last_token_s),
        end=_moment(trace, attempt.end_s),
        tokens_before=attempt.tokens_before,
        policy=attempt.policy,
        expected_cached_tokens=attempt.expected_cached_tokens,
        cached_tokens=attempt.cached_tokens,
        placement=placement_to_proto(attempt.placement),
    )
    if attempt.prefill_worker is not None:
        accepted, finish = attempt.prefill_accepted_s, attempt.prefill_finish
        message.prefill.CopyFrom(_leg(trace, WorkerRole.PREFILL, attempt.prefill_worker, accepted, finish))
    if attempt.decode_worker is not None:
        accepted, finish = attempt.decode_accepted_s, attempt.decode_finish
        message.decode.CopyFrom(_leg(trace, decode_role, attempt.decode_worker, accepted, finish))
    if attempt.failed_leg:
        message.failure.CopyFrom(_failure(attempt))
    return message


def _leg(
    trace: RequestTrace, role: WorkerRole, worker: Worker, accepted_s: float | None, finish: leg_pb2.LegFinish | None
) -> pb.TimelineLeg:
    return pb.TimelineLeg(
        role=ROLES[role],
        worker_id=worker.worker_id,
        epoch=worker.epoch,
        address=worker.address,
        accepted=_moment(trace, accepted_s),
        timings=None if finish is None else finish.timings,
    )


def _failure(attempt: AttemptTrace) -> pb.TimelineFailure:
    return pb.TimelineFailure(
        leg=ROLES[WorkerRole(attempt.failed_leg)],
        worker_id="" if attempt.failed_worker is None else attempt.failed_worker.worker_id,
        phase=attempt.phase,
        reason=reason_number(attempt.reason),
    )


def _moment(trace: RequestTrace, time_s: float | None) -> pb.Moment | None:
    if time_s is None:
        return None
    return pb.Moment(time=timestamp(time_s), offset=duration(time_s - trace.begin_s))


def _texts(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in attributes.items()}


def _latencies(gaps_s: Sequence[float]) -> Latencies | None:
    """Exact percentiles of the inter-batch times kept in one trace."""
    if not gaps_s:
        return None
    ordered = sorted(gaps_s)
    p50_s, p90_s, p99_s = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99))
    return Latencies(len(ordered), p50_s, p90_s, p99_s, ordered[-1])
