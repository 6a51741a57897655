"""The lines of a request's timeline, ordered by start time: one for each step, attempt, leg and event, with its text.

Owns what is said of a request, for `tandem trace` and the console alike; each of them draws the bars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf import duration_pb2

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.types.v1 import error_pb2, generation_pb2, worker_pb2
from tandem.errors import ContextExceeded, InvalidRequest, NotSupported, RequestTooLarge
from tandem.rpc.convert import kv_check_text, placement_text, seconds

PREFILL_WAITS = (
    ("queued_time", "bootstrap_end_time", "bootstrap with peer"),
    ("bootstrap_end_time", "prefill_start_time", "waits in the prefill queue"),
)
DECODE_WAITS = (
    ("queued_time", "preallocation_end_time", "bootstrap with peer, KV preallocation"),
    ("preallocation_end_time", "kv_transfer_end_time", "waits for KV"),
)
REFUSALS = frozenset(
    error_pb2.ErrorReason.Value(f"ERROR_REASON_{kind.reason}")
    for kind in (InvalidRequest, ContextExceeded, RequestTooLarge, NotSupported)
)
"""Reasons of a leg's end that are the request's fault."""


@dataclass(frozen=True, slots=True)
class Line:
    """A span or an instant of the timeline; times are offsets from the start of the request."""

    begin_s: float
    end_s: float | None
    """None: still in progress."""
    text: str
    depth: int = 0
    is_moment: bool = False
    part: str = "frontend"
    """Where the time was spent: edge, frontend, attempt, or the role of a leg's worker."""


def ending_of(timeline: pb.RequestTimeline) -> str:
    """How it ended: the outcome and its reason; "open" while it has not."""
    outcome = pb.RequestOutcome.Name(timeline.outcome).removeprefix("REQUEST_OUTCOME_").lower()
    if timeline.HasField("finish_reason"):
        reason = generation_pb2.FinishReason.Name(timeline.finish_reason)
        return f"{outcome}: {reason.removeprefix('FINISH_REASON_').lower()}"
    return f"{outcome}: {error_reason(timeline.error_reason)}" if timeline.HasField("error_reason") else outcome


def stats_of(timeline: pb.RequestTimeline) -> Iterator[str]:
    """Its duration, tokens and latencies, as far as they are known."""
    if timeline.HasField("end"):
        yield f"took {time_text(offset_s(timeline.end))}"
    if timeline.HasField("usage"):
        usage = timeline.usage
        yield f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({usage.cached_tokens} cached)"
    elif timeline.completion_tokens:
        so_far = " so far" if timeline.outcome == pb.REQUEST_OUTCOME_OPEN else ""
        yield f"{timeline.completion_tokens} {'token' if timeline.completion_tokens == 1 else 'tokens'}{so_far}"
    if timeline.HasField("first_token"):
        yield f"TTFT {time_text(offset_s(timeline.first_token))}"
    if timeline.HasField("inter_token_latency"):
        itl = timeline.inter_token_latency
        p50, p99, longest = (time_text(duration_s(value)) for value in (itl.p50, itl.p99, itl.longest))
        yield f"ITL p50 {p50}, p99 {p99}, longest {longest}"


def lines_of(timeline: pb.RequestTimeline) -> Iterator[Line]:
    """Steps, attempts and events by start time; the lines of an attempt follow it directly."""
    blocks: list[tuple[float, list[Line]]] = []
    if timeline.HasField("edge_begin"):
        # On the edge's clock, uncorrected like the times of workers.
        begin_s = offset_s(timeline.edge_begin)
        blocks.append(
            (begin_s, [Line(begin_s, max(begin_s, 0.0), "edge, until the frontend received it", part="edge")])
        )
    for step in timeline.steps:
        end_s = offset_s(step.end) if step.HasField("end") else None
        text = " ".join([step.name, *_attributes(step.attributes)])
        blocks.append((offset_s(step.begin), [Line(offset_s(step.begin), end_s, text)]))
    for event in timeline.events:
        text = " ".join([event.name, *_attributes(event.attributes)])
        blocks.append((offset_s(event.at), [_moment(event.at, text)]))
    blocks.extend((offset_s(attempt.dispatched), list(_attempt(attempt))) for attempt in timeline.attempts)
    for _, lines in sorted(blocks, key=lambda block: block[0]):
        yield from lines
    if timeline.HasField("end"):
        yield _moment(timeline.end, ending_of(timeline))


def _attempt(attempt: pb.TimelineAttempt) -> Iterator[Line]:
    facts = [f"attempt {attempt.number}"]
    if attempt.tokens_before:
        facts.append(f"continues after {attempt.tokens_before} tokens")
    if attempt.bootstrap_room:
        facts.append(f"room {attempt.bootstrap_room}")
    if attempt.HasField("candidates"):
        by = f" by {attempt.policy}" if attempt.policy else ""
        facts.append(f"chosen{by} from {attempt.candidates} {'route' if attempt.candidates == 1 else 'routes'}")
    if attempt.placement:
        kind = "a pair" if attempt.HasField("prefill") else "an aggregated worker"
        facts.append(f"on {kind}: {placement_text(attempt.placement)}")
    facts.extend(_cached(attempt))
    end_s = offset_s(attempt.end) if attempt.HasField("end") else None
    yield Line(offset_s(attempt.dispatched), end_s, ", ".join(facts), part="attempt")
    inner = [line for leg in _legs(attempt) for line in _leg(leg, attempt)]
    if attempt.HasField("first_token"):
        last_s = offset_s(attempt.last_token)
        inner.append(
            Line(offset_s(attempt.first_token), last_s, "first to last token", depth=1, part=role(attempt.decode.role))
        )
    # The sort is stable: of lines with the same start the legs come first, as their text names the worker.
    yield from sorted(inner, key=lambda line: line.begin_s)
    if attempt.HasField("failure"):
        failure = attempt.failure
        phase = f" in phase {failure.phase}" if failure.phase else ""
        failed = f"{role(failure.leg)} leg on {failure.worker_id}" if failure.worker_id else "attempt"
        at = attempt.end if attempt.HasField("end") else attempt.dispatched
        verb = "refused the request" if failure.reason in REFUSALS else "failed"
        yield _moment(at, f"{failed} {verb}{phase}: {error_reason(failure.reason)}", depth=1)


def _cached(attempt: pb.TimelineAttempt) -> Iterator[str]:
    """How much of the prompt was cached, and was expected to be, as far as either is known."""
    if attempt.HasField("expected_cached_tokens"):
        was = f", {attempt.cached_tokens} were" if attempt.HasField("cached_tokens") else ""
        yield f"{attempt.expected_cached_tokens} tokens expected in the prefix cache{was}"
    elif attempt.HasField("cached_tokens"):
        yield f"{attempt.cached_tokens} tokens were in the prefix cache"


def _legs(attempt: pb.TimelineAttempt) -> Iterator[pb.TimelineLeg]:
    if attempt.HasField("prefill"):
        yield attempt.prefill
    yield attempt.decode


def _leg(leg: pb.TimelineLeg, attempt: pb.TimelineAttempt) -> Iterator[Line]:
    part = role(leg.role)
    name, worker = f"{part} leg", f"{leg.worker_id} ({leg.address}, epoch {leg.epoch})"
    begin_s = offset_s(attempt.dispatched)
    if leg.HasField("accepted"):
        yield Line(begin_s, offset_s(leg.accepted), f"{name} accepted by {worker}", depth=1, part=part)
    else:
        yield Line(begin_s, begin_s, f"{name} sent to {worker}, not accepted", depth=1, is_moment=True, part=part)
    # Worker timestamps come from the worker's clock. They are shown uncorrected: the skew is not known.
    timings, zero_s = leg.timings, seconds(attempt.dispatched.time) - begin_s
    moved = f", {timings.kv_transfer_bytes:,} bytes" if timings.kv_transfer_bytes else ""
    moved += kv_check_text(timings.kv_check)
    waits: tuple[tuple[str, str, str], ...] = (("queued_time", "prefill_start_time", "waits in the engine"),)
    if timings.HasField("bootstrap_end_time"):
        waits = PREFILL_WAITS
    elif timings.HasField("preallocation_end_time"):
        waits = DECODE_WAITS
    for begin, end, text in (
        *waits,
        ("prefill_start_time", "prefill_end_time", "prefill"),
        ("kv_transfer_start_time", "kv_transfer_end_time", f"KV transfer{moved}"),
    ):
        if timings.HasField(begin) and timings.HasField(end):  # type: ignore[arg-type]
            from_s, to_s = seconds(getattr(timings, begin)) - zero_s, seconds(getattr(timings, end)) - zero_s
            yield Line(from_s, to_s, f"{leg.worker_id}: {text}", depth=2, part=part)


def _moment(at: pb.Moment, text: str, depth: int = 0) -> Line:
    return Line(offset_s(at), offset_s(at), text, depth, is_moment=True)


def _attributes(attributes: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{name}={attributes[name]}" for name in sorted(attributes))


def role(number: worker_pb2.WorkerRole.ValueType) -> str:
    """Name of a role, in lower case."""
    return worker_pb2.WorkerRole.Name(number).removeprefix("WORKER_ROLE_").lower()


def error_reason(number: error_pb2.ErrorReason.ValueType) -> str:
    """Name of a reason, without its prefix."""
    return error_pb2.ErrorReason.Name(number).removeprefix("ERROR_REASON_")


def duration_s(duration: duration_pb2.Duration) -> float:
    """A duration in seconds."""
    return duration.ToNanoseconds() / 1e9


def offset_s(moment: pb.Moment) -> float:
    """Seconds since the arrival of the request."""
    return duration_s(moment.offset)


def time_text(value_s: float) -> str:
    """Seconds from 10 s on, else milliseconds, with one decimal below 100 ms."""
    if abs(value_s) >= 10:
        return f"{value_s:.2f} s"
    return f"{value_s * 1e3:.1f} ms" if abs(value_s) < 0.1 else f"{value_s * 1e3:.0f} ms"
