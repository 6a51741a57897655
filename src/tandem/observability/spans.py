"""From a course that has closed to its spans: pure, and only done for courses that are sampled.

Every time is the one the course holds. Steps whose begin or end is not known make no span; nothing is guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tandem.domain.generation import EngineTimings
from tandem.domain.worker import Worker
from tandem.observability import span_names as names
from tandem.observability.request_trace import BROKEN, CANCELLED, FINISHED, AttemptCourse, Course, Event, LegCourse

NewId = Callable[[], int]


@dataclass(slots=True)
class Span:
    """One span, before anybody's format."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    begin_s: float
    end_s: float
    attributes: dict[str, Any] = field(default_factory=dict)
    kind: str = "internal"
    """Or server, or client."""
    is_parent_remote: bool = False
    state: str = ""
    events: list[Event] = field(default_factory=list)
    links: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Spans of the same trace."""
    error: str | None = None
    """Why it failed; None: it did not."""


def is_sampled(course: Course | LegCourse) -> bool:
    """Whether its spans are wanted."""
    return course.trace is not None and course.trace.is_sampled


def spans_of(course: Course | LegCourse, new_id: NewId) -> list[Span]:
    """The spans of a sampled course, its own first."""
    return _request_spans(course, new_id) if isinstance(course, Course) else _leg_spans(course, new_id)


# --- A request in the frontend


def _request_spans(course: Course, new_id: NewId) -> list[Span]:
    own = _own(course, course.operation, _request_attributes(course))
    own.events += course.events
    if course.first_token_s is not None:
        own.events.append(Event("first token", course.first_token_s, {names.TTFT_S: course.ttft_s}))
    spans = [own, *(_below(own, new_id(), step.name, step.begin_s, step.end_s) for step in course.steps)]
    routes = [span for span in spans if span.name == names.ROUTE]
    earlier: AttemptCourse | None = None
    for attempt, route in itertools.zip_longest(course.attempts, routes):
        if attempt is None:
            continue
        if route is not None:
            route.attributes |= _route_attributes(attempt)
        spans += _attempt_spans(own, course, attempt, earlier, new_id)
        earlier = attempt
    if course.last_token_s is not None and course.outcome == FINISHED:
        spans.append(_below(own, new_id(), names.FINISH, course.last_token_s, own.end_s))
    return spans


def _attempt_spans(
    own: Span, course: Course, attempt: AttemptCourse, earlier: AttemptCourse | None, new_id: NewId
) -> Iterator[Span]:
    end_s = attempt.end_s if attempt.end_s is not None else own.end_s
    span_id = attempt.trace.span_id if attempt.trace is not None else new_id()
    span = _below(own, span_id, names.ATTEMPT, attempt.begin_s, end_s, _attempt_attributes(course, attempt))
    span.kind = "client"
    if attempt.outcome == BROKEN:
        span.error = attempt.reason
        span.attributes[names.ERROR_TYPE] = attempt.reason
    if earlier is not None and earlier.trace is not None:
        span.links.append((earlier.trace.span_id, {names.CONTINUES: attempt.tokens_before > 0}))
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


def _request_attributes(course: Course) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.OPERATION: course.operation,
        names.MODEL: course.model,
        names.REQUEST_ID: course.request_id,
        names.OUTCOME: course.outcome,
        names.INPUT_TOKENS: course.prompt_tokens,
        names.OUTPUT_TOKENS: course.completion_tokens or course.token_count,
    }
    optional: dict[str, Any] = {
        names.TENANT: course.tenant or None,
        names.MAX_TOKENS: course.max_tokens,
        names.TTFT_S: course.ttft_s,
        names.KV_BYTES: course.kv_transfer_bytes or None,
        names.PROMPT: course.prompt,
    }
    if course.outcome == FINISHED:
        optional |= {names.FINISH_REASONS: [course.reason], names.CACHED_TOKENS: course.cached_tokens}
    return attributes | {name: value for name, value in optional.items() if value is not None}


def _attempt_attributes(course: Course, attempt: AttemptCourse) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.REQUEST_ID: course.request_id,
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


def _route_attributes(attempt: AttemptCourse) -> dict[str, Any]:
    chosen: dict[str, Worker | None] = {
        names.PREFILL_WORKER: attempt.prefill_worker,
        names.DECODE_WORKER: attempt.decode_worker,
    }
    return {
        names.ATTEMPT_NUMBER: attempt.number,
        names.CANDIDATES_COUNT: attempt.candidates_count,
        names.CANDIDATES: attempt.candidates,
        names.WHY: attempt.why,
        **{name: worker.worker_id for name, worker in chosen.items() if worker is not None},
    }


# --- A leg in a worker


def _leg_spans(course: LegCourse, new_id: NewId) -> list[Span]:
    finish = course.engine_finish
    own = _own(course, names.LEG.get(course.role, course.role), _leg_attributes(course))
    spans = [own]
    timings = finish.timings if finish is not None else None
    for name, begin_s, end_s in _leg_steps(course, timings) if timings is not None else ():
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


def _leg_steps(course: LegCourse, timings: EngineTimings) -> tuple[tuple[str, float | None, float | None], ...]:
    """Name, begin and end of each step: the engine's times, between the worker's own of its first and last word."""
    submit = names.SUBMIT, course.begin_s, timings.queued_time_s
    # To the worker, not to the scheduler: on a busy core a token waits between the two as long as for its computing.
    stream = names.STREAM, course.first_token_s, course.last_token_s
    if course.role == "decode":
        return (
            submit,
            (names.PREALLOCATE, timings.queued_time_s, timings.preallocation_end_time_s),
            (names.WAIT_FOR_KV, timings.preallocation_end_time_s, timings.kv_transfer_end_time_s),
            (names.FIRST_TOKEN, timings.kv_transfer_end_time_s, course.first_token_s),
            stream,
        )
    queued = timings.bootstrap_end_time_s if course.role == "prefill" else timings.queued_time_s
    computing = (
        submit,
        (names.BOOTSTRAP, timings.queued_time_s, timings.bootstrap_end_time_s),
        (names.QUEUE, queued, timings.prefill_start_time_s),
        (names.PREFILL, timings.prefill_start_time_s, timings.prefill_end_time_s),
    )
    if course.role == "prefill":
        return (*computing, (names.TRANSFER, timings.kv_transfer_start_time_s, timings.kv_transfer_end_time_s))
    return (*computing, (names.FIRST_TOKEN, timings.prefill_end_time_s, course.first_token_s), stream)


def _leg_attributes(course: LegCourse) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.MODEL: course.model,
        names.REQUEST_ID: course.request_id,
        names.ATTEMPT_NUMBER: course.attempt,
        names.ROLE: course.role,
        names.WORKER: course.worker_id,
        names.EPOCH: course.epoch,
        names.OUTCOME: course.outcome,
        names.INPUT_TOKENS: course.prompt_tokens,
        names.OUTPUT_TOKENS: course.token_count,
    }
    if course.room:
        attributes[names.ROOM] = course.room
    finish = course.engine_finish
    if finish is not None:
        attributes |= {names.FINISH_REASONS: [finish.reason.value], names.CACHED_TOKENS: finish.cached_tokens}
        if finish.recomputed_tokens is not None:
            attributes[names.RECOMPUTED_TOKENS] = finish.recomputed_tokens
        if finish.timings is not None and finish.timings.kv_transfer_bytes is not None:
            attributes[names.KV_BYTES] = finish.timings.kv_transfer_bytes
    return attributes


# --- Both


def _own(course: Course | LegCourse, name: str, attributes: dict[str, Any]) -> Span:
    """The span of the course itself."""
    trace, parent = course.trace, course.parent
    assert trace is not None, "a course without a trace has no spans"
    span = Span(
        name=name,
        trace_id=trace.trace_id,
        span_id=trace.span_id,
        parent_id=None if parent is None else parent.span_id,
        begin_s=course.begin_s,
        end_s=course.begin_s if course.end_s is None else course.end_s,
        attributes=attributes,
        kind="server",
        is_parent_remote=parent is not None,
        state=trace.state,
    )
    if course.outcome not in (FINISHED, CANCELLED):
        span.error = course.message or course.reason
        span.attributes[names.ERROR_TYPE] = course.reason
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
