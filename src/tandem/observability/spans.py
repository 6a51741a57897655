"""Derives the spans of a closed trace; pure, and only called for sampled traces.

All times are those of the trace. A step without a known start or end has no span; nothing is estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tandem.domain.generation import EngineTimings
from tandem.domain.worker import Worker
from tandem.observability import span_names as names
from tandem.observability.request_trace import (
    BROKEN,
    CANCELLED,
    FINISHED,
    REFUSED,
    AttemptTrace,
    Event,
    LegTrace,
    RequestTrace,
)

NewId = Callable[[], int]


@dataclass(slots=True)
class Span:
    """One span, independent of the export format."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    begin_s: float
    end_s: float
    attributes: dict[str, Any] = field(default_factory=dict)
    kind: str = "internal"
    """internal, server or client."""
    is_parent_remote: bool = False
    state: str = ""
    events: list[Event] = field(default_factory=list)
    links: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(span id, attributes) of linked spans of the same trace."""
    error: str | None = None
    """Error message; None: no error."""


def is_sampled(trace: RequestTrace | LegTrace) -> bool:
    """Whether the trace is sampled."""
    return trace.span_context is not None and trace.span_context.is_sampled


def spans_of(trace: RequestTrace | LegTrace, new_id: NewId) -> list[Span]:
    """The spans of a sampled trace, root first."""
    return _request_spans(trace, new_id) if isinstance(trace, RequestTrace) else _leg_spans(trace, new_id)


# --- A request in the frontend


def _request_spans(trace: RequestTrace, new_id: NewId) -> list[Span]:
    own = _own(trace, trace.operation, _request_attributes(trace))
    own.events += trace.events
    if trace.first_token_s is not None:
        own.events.append(Event("first token", trace.first_token_s, {names.TTFT_S: trace.ttft_s}))
    spans = [own, *(_below(own, new_id(), step.name, step.begin_s, step.end_s) for step in trace.steps)]
    routes = [span for span in spans if span.name == names.ROUTE]
    earlier: AttemptTrace | None = None
    for attempt, route in itertools.zip_longest(trace.attempts, routes):
        if attempt is None:
            continue
        if route is not None:
            route.attributes |= _route_attributes(attempt)
        spans += _attempt_spans(own, trace, attempt, earlier, new_id)
        earlier = attempt
    if trace.last_token_s is not None and trace.outcome == FINISHED:
        spans.append(_below(own, new_id(), names.FINISH, trace.last_token_s, own.end_s))
    return spans


def _attempt_spans(
    own: Span, trace: RequestTrace, attempt: AttemptTrace, earlier: AttemptTrace | None, new_id: NewId
) -> Iterator[Span]:
    end_s = attempt.end_s if attempt.end_s is not None else own.end_s
    span_id = attempt.span_context.span_id if attempt.span_context is not None else new_id()
    span = _below(own, span_id, names.ATTEMPT, attempt.begin_s, end_s, _attempt_attributes(trace, attempt))
    span.kind = "client"
    if attempt.outcome in (BROKEN, REFUSED):
        span.error = attempt.reason
        span.attributes[names.ERROR_TYPE] = attempt.reason
    if earlier is not None and earlier.span_context is not None:
        span.links.append((earlier.span_context.span_id, {names.CONTINUES: attempt.tokens_before > 0}))
    yield span
    accepted = [
        time_s
        for worker, time_s in (
            (attempt.prefill_worker, attempt.prefill_accepted_s),
            (attempt.decode_worker, attempt.decode_accepted_s),
        )
        if worker is not None
    ]
    known = [time_s for time_s in accepted if time_s is not None]
    if known and len(known) == len(accepted):
        yield _below(span, new_id(), names.DISPATCH, attempt.begin_s, max(known))
        if attempt.first_token_s is not None:
            yield _below(span, new_id(), names.AWAIT, max(known), attempt.first_token_s)


def _request_attributes(trace: RequestTrace) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.OPERATION: trace.operation,
        names.MODEL: trace.model,
        names.REQUEST_ID: trace.request_id,
        names.OUTCOME: trace.outcome,
        names.INPUT_TOKENS: trace.prompt_tokens,
        names.OUTPUT_TOKENS: trace.completion_tokens or trace.token_count,
    }
    optional: dict[str, Any] = {
        names.TENANT: trace.tenant or None,
        names.MAX_TOKENS: trace.max_tokens,
        names.TTFT_S: trace.ttft_s,
        names.KV_BYTES: trace.kv_transfer_bytes or None,
        names.PROMPT: trace.prompt,
    }
    if trace.outcome == FINISHED:
        optional |= {names.FINISH_REASONS: [trace.reason], names.CACHED_TOKENS: trace.cached_tokens}
    return attributes | {name: value for name, value in optional.items() if value is not None}


def _attempt_attributes(trace: RequestTrace, attempt: AttemptTrace) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.REQUEST_ID: trace.request_id,
        names.ATTEMPT_NUMBER: attempt.number,
        names.OUTCOME: attempt.outcome,
        names.TOKENS_BEFORE: attempt.tokens_before,
    }
    if attempt.room:
        attributes[names.ROOM] = attempt.room
    for worker, name, epoch in (
        (attempt.prefill_worker, names.PREFILL_WORKER, names.PREFILL_EPOCH),
        (attempt.decode_worker, names.DECODE_WORKER, names.DECODE_EPOCH),
    ):
        if worker is not None:
            attributes |= {name: worker.worker_id, epoch: worker.epoch}
    if attempt.failed_worker is not None:
        attributes |= {
            names.FAILED_LEG: attempt.failed_leg,
            names.FAILED_WORKER: attempt.failed_worker.worker_id,
            names.PHASE: attempt.phase,
        }
    return attributes


def _route_attributes(attempt: AttemptTrace) -> dict[str, Any]:
    chosen: dict[str, Worker | None] = {
        names.PREFILL_WORKER: attempt.prefill_worker,
        names.DECODE_WORKER: attempt.decode_worker,
    }
    return {
        names.ATTEMPT_NUMBER: attempt.number,
        names.CANDIDATES_COUNT: attempt.candidates_count,
        names.CANDIDATES: attempt.candidates,
        names.WHY: attempt.why,
        names.POLICY: attempt.policy,
        **({} if attempt.placement is None else {names.PLACEMENT: attempt.placement.value}),
        **_cached(attempt),
        **{name: worker.worker_id for name, worker in chosen.items() if worker is not None},
    }


def _cached(attempt: AttemptTrace) -> dict[str, Any]:
    """What the policy expected in the prefix cache, and what was there, as far as either is known."""
    counts = {names.EXPECTED_CACHED_TOKENS: attempt.expected_cached_tokens, names.CACHED_TOKENS: attempt.cached_tokens}
    return {name: count for name, count in counts.items() if count is not None}


# --- A leg in a worker


def _leg_spans(trace: LegTrace, new_id: NewId) -> list[Span]:
    finish = trace.engine_finish
    own = _own(trace, names.LEG.get(trace.role, trace.role), _leg_attributes(trace))
    spans = [own]
    timings = finish.timings if finish is not None else None
    for name, begin_s, end_s in _leg_steps(trace, timings) if timings is not None else ():
        if begin_s is not None and end_s is not None:
            spans.append(_below(own, new_id(), name, begin_s, end_s))
    if timings is not None and timings.first_token_time_s is not None:
        for span in spans:
            if span.name == names.FIRST_TOKEN:
                span.events.append(Event(names.IN_ENGINE, timings.first_token_time_s))
    if timings is not None and timings.kv_transfer_bytes is not None:
        for span in spans:
            if span.name in (names.TRANSFER, names.WAIT_FOR_KV):
                span.attributes[names.KV_BYTES] = timings.kv_transfer_bytes
    return spans


def _leg_steps(trace: LegTrace, timings: EngineTimings) -> tuple[tuple[str, float | None, float | None], ...]:
    """Name, start and end of each step: engine times, bounded by the worker's times of acceptance and last token."""
    submit = names.SUBMIT, trace.begin_s, timings.queued_time_s
    # Worker time, not scheduler time: on a busy core a token waits between them as long as it takes to compute.
    stream = names.STREAM, trace.first_token_s, trace.last_token_s
    if trace.role == "decode":
        return (
            submit,
            (names.PREALLOCATE, timings.queued_time_s, timings.preallocation_end_time_s),
            (names.WAIT_FOR_KV, timings.preallocation_end_time_s, timings.kv_transfer_end_time_s),
            (names.FIRST_TOKEN, timings.kv_transfer_end_time_s, trace.first_token_s),
            stream,
        )
    queued = timings.bootstrap_end_time_s if trace.role == "prefill" else timings.queued_time_s
    computing = (
        submit,
        (names.BOOTSTRAP, timings.queued_time_s, timings.bootstrap_end_time_s),
        (names.QUEUE, queued, timings.prefill_start_time_s),
        (names.PREFILL, timings.prefill_start_time_s, timings.prefill_end_time_s),
    )
    if trace.role == "prefill":
        return (*computing, (names.TRANSFER, timings.kv_transfer_start_time_s, timings.kv_transfer_end_time_s))
    return (*computing, (names.FIRST_TOKEN, timings.prefill_end_time_s, trace.first_token_s), stream)


def _leg_attributes(trace: LegTrace) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.MODEL: trace.model,
        names.REQUEST_ID: trace.request_id,
        names.ATTEMPT_NUMBER: trace.attempt,
        names.ROLE: trace.role,
        names.WORKER: trace.worker_id,
        names.EPOCH: trace.epoch,
        names.OUTCOME: trace.outcome,
        names.INPUT_TOKENS: trace.prompt_tokens,
        names.OUTPUT_TOKENS: trace.token_count,
    }
    if trace.room:
        attributes[names.ROOM] = trace.room
    finish = trace.engine_finish
    if finish is not None:
        attributes |= {names.FINISH_REASONS: [finish.reason.value], names.CACHED_TOKENS: finish.cached_tokens}
        if finish.recomputed_tokens is not None:
            attributes[names.RECOMPUTED_TOKENS] = finish.recomputed_tokens
        if finish.kv_check is not None:
            attributes[names.KV_CHECK] = finish.kv_check.value
        if finish.timings is not None and finish.timings.kv_transfer_bytes is not None:
            attributes[names.KV_BYTES] = finish.timings.kv_transfer_bytes
    return attributes


# --- Both


def _own(trace: RequestTrace | LegTrace, name: str, attributes: dict[str, Any]) -> Span:
    """The root span of a trace."""
    span_context, parent = trace.span_context, trace.parent
    assert span_context is not None, "a trace without a span context has no spans"
    span = Span(
        name=name,
        trace_id=span_context.trace_id,
        span_id=span_context.span_id,
        parent_id=None if parent is None else parent.span_id,
        begin_s=trace.begin_s,
        end_s=trace.begin_s if trace.end_s is None else trace.end_s,
        attributes=attributes,
        kind="server",
        is_parent_remote=parent is not None,
        state=span_context.state,
    )
    if trace.outcome not in (FINISHED, CANCELLED):
        span.error = trace.message or trace.reason
        span.attributes[names.ERROR_TYPE] = trace.reason
    return span


def _below(
    parent: Span, span_id: int, name: str, begin_s: float, end_s: float, attributes: dict[str, Any] | None = None
) -> Span:
    return Span(
        name,
        parent.trace_id,
        span_id,
        parent.span_id,
        begin_s,
        max(begin_s, end_s),
        attributes or {},
        state=parent.state,
    )
