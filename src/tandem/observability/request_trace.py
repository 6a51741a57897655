"""The trace of a request or leg: what happened and when, written while it runs, read when it closes.

Spans, metrics, the summary log line and `tandem trace` are all derived from this record. Times are seconds since the
Unix epoch on this process's clock. It holds no token ids and no secrets, and the prompt only with `trace_prompts`.
Writing costs a few attribute sets per attempt and one call per batch of tokens; nothing is computed here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.api.types.v1 import leg_pb2
from tandem.clock import SteadyTime
from tandem.domain.generation import EngineFinish
from tandem.domain.placement import Placement
from tandem.domain.worker import Worker
from tandem.observability.trace_context import TraceContext

FINISHED, FAILED, REFUSED, CANCELLED = "finished", "failed", "refused", "cancelled"
"""Outcome of a request. REFUSED: rejected before a leg was dispatched, or by an engine because the request itself is
wrong, before its first token. CANCELLED: the caller cancelled."""
OUTCOMES = (FINISHED, FAILED, REFUSED, CANCELLED)
BROKEN, ENDED = "broken", "ended"
"""Outcome of an attempt besides FINISHED and REFUSED. BROKEN: a leg failed. ENDED: the frontend ended it, for a stop
string or a cancelled request."""
GAPS_MAX = 4096
"""Maximum number of inter-batch times kept per trace; later ones are dropped."""
EVENTS_MAX = 64


def _gaps() -> array[float]:
    return array("f")


@dataclass(slots=True, kw_only=True)
class Tokens:
    """Arrival times of tokens."""

    clock: Callable[[], float] = field(default_factory=SteadyTime)
    """Wall clock that advances monotonically from its first reading: setting the system clock reorders nothing."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    token_count: int = 0
    gaps_s: array[float] = field(default_factory=_gaps)
    """Seconds between consecutive batches of tokens; the first GAPS_MAX."""

    def note_tokens(self, now_s: float, count: int) -> None:
        """Record the arrival of a batch of tokens. Hot path: called once per batch."""
        if self.last_token_s is None:
            self.first_token_s = now_s
        elif len(self.gaps_s) < GAPS_MAX:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s
        self.token_count += count


@dataclass(slots=True)
class Step:
    """A step inside the frontend: admit, tokenise, wait, route."""

    name: str
    begin_s: float
    end_s: float
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """An event at one point in time."""

    name: str
    time_s: float
    attributes: dict[str, Any] = field(default_factory=dict)


def kv_transfer_bytes(prefill: leg_pb2.LegFinish | None, decode: leg_pb2.LegFinish | None) -> int | None:
    """KV bytes that moved between the legs of one attempt; None: neither leg reported any.

    Decode's count wins, because it counts what arrived. Prefill's stands in where decode failed or does not count.
    """
    for finish in (decode, prefill):
        if finish is not None and finish.timings.HasField("kv_transfer_bytes"):
            return finish.timings.kv_transfer_bytes
    return None


@dataclass(slots=True, kw_only=True)
class AttemptTrace:
    """One attempt with its legs, as seen by the frontend."""

    number: int = 1
    clock: Callable[[], float] = field(default_factory=SteadyTime)
    span_context: TraceContext | None = None
    """Its span, the parent of those of its legs; the caller's span if nothing is exported."""
    room: int = 0
    """Bootstrap room; 0: aggregated, one leg only."""
    prefill_worker: Worker | None = None
    decode_worker: Worker | None = None
    """The decode or aggregated worker."""
    candidates_count: int = 0
    """Number of routes (pairs and aggregated workers) to choose from."""
    candidates: str = ""
    """Some of these routes, by name."""
    policy: str = ""
    """Routing policy."""
    why: str = ""
    """Why the policy chose this route."""
    expected_cached_tokens: int | None = None
    """Prompt tokens that the policy expected in the prefix cache of the computing worker; None: unknown."""
    placement: Placement | None = None
    """Why a pair, or an aggregated worker; None: there was nothing to decide."""
    begin_s: float = 0.0
    """When its legs were dispatched."""
    prefill_accepted_s: float | None = None
    decode_accepted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    tokens_before: int = 0
    """Tokens sent to the client before this attempt; > 0: a continuation."""
    outcome: str = ""
    """FINISHED, BROKEN, REFUSED or ENDED; empty while it runs."""
    failed_leg: str = ""
    failed_worker: Worker | None = None
    phase: str = ""
    """Phase in which the leg failed."""
    reason: str = ""
    """ErrorInfo reason of the failure."""
    is_refusal: bool = False
    """Whether the leg was refused because the request itself is wrong: no failure of its worker."""
    prefill_finish: leg_pb2.LegFinish | None = None
    decode_finish: leg_pb2.LegFinish | None = None

    def accepted(self, leg: str) -> None:
        """Record that a worker accepted its leg: "prefill", "decode" or "aggregated"."""
        if leg == "prefill":
            self.prefill_accepted_s = self.clock()
        else:
            self.decode_accepted_s = self.clock()

    def broke(self, leg: str, worker: Worker, phase: str, reason: str, *, is_refusal: bool = False) -> None:
        """Record the failed leg. Only the first is kept: the second leg usually fails because of the first."""
        if not self.failed_leg:
            self.failed_leg, self.failed_worker, self.phase, self.reason = leg, worker, phase, reason
            self.is_refusal = is_refusal

    def end(self, prefill: leg_pb2.LegFinish | None, decode: leg_pb2.LegFinish | None) -> None:
        """Record the end of the attempt, with the finish of each leg; None: the leg did not finish."""
        self.end_s = self.clock()
        self.prefill_finish, self.decode_finish = prefill, decode
        failed = REFUSED if self.is_refusal else BROKEN
        self.outcome = FINISHED if decode is not None else failed if self.failed_leg else ENDED

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were in the prefix cache of the computing worker; None: its leg did not finish."""
        finish = self.decode_finish if self.prefill_worker is None else self.prefill_finish
        return None if finish is None else finish.usage.cached_tokens

    @property
    def kv_transfer_bytes(self) -> int:
        """KV bytes that moved between its legs; 0 before `end` and where neither leg reported any."""
        return kv_transfer_bytes(self.prefill_finish, self.decode_finish) or 0


@dataclass(slots=True, kw_only=True)
class RequestTrace(Tokens):
    """Trace of a request in the frontend, over all its attempts."""

    request_id: str = ""
    call_id: str = ""
    """x-request-id of the HTTP call, if any; several requests may share it."""
    operation: str = "generate"
    """generate, chat, text_completion or embeddings."""
    model: str = ""
    tenant: str = ""
    parent: TraceContext | None = None
    """The caller's span."""
    span_context: TraceContext | None = None
    """Span of this request; the caller's if nothing is exported."""
    edge_begin_s: float | None = None
    """When the edge received its call, on the edge's clock; None: no edge forwarded it."""
    begin_s: float = 0.0
    end_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    max_tokens: int | None = None
    prompt: str | None = None
    """Only with the setting `trace_prompts`."""
    left_s: float | None = None
    """When the client's cancellation was noticed while legs were running."""
    steps: list[Step] = field(default_factory=list)
    attempts: list[AttemptTrace] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    outcome: str = ""
    """One of OUTCOMES; empty while it runs."""
    reason: str = ""
    """FinishReason name in lower case, or ErrorInfo reason."""
    message: str = ""
    """Error message; for an invalid request only the name of the field."""
    field: str = ""
    """The wrong field of a refused request; empty: none is named."""

    def step(self, name: str, begin_s: float, **attributes: Any) -> float:
        """Record a step that ends now; returns the current time."""
        now_s = self.clock()
        self.steps.append(Step(name, begin_s, now_s, attributes))
        return now_s

    def event(self, name: str, **attributes: Any) -> None:
        """Record an event; dropped after EVENTS_MAX."""
        if len(self.events) < EVENTS_MAX:
            self.events.append(Event(name, self.clock(), attributes))

    def add_attempt(self, attempt: AttemptTrace) -> AttemptTrace:
        """Add an attempt; returns it."""
        self.attempts.append(attempt)
        return attempt

    def note_tokens(self, now_s: float, count: int) -> None:
        """Record the arrival of a batch of tokens of the last attempt."""
        # Not super(): in a dataclass with slots it doubles the cost of the call.
        Tokens.note_tokens(self, now_s, count)
        if self.attempts:
            attempt = self.attempts[-1]
            attempt.last_token_s = now_s
            if attempt.first_token_s is None:
                attempt.first_token_s = now_s

    def finish(self, reason: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> None:
        """Record the finish sent to the client."""
        self.outcome, self.reason = FINISHED, reason
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.cached_tokens = cached_tokens

    def fail(self, reason: str, message: str, *, is_refusal: bool = False) -> None:
        """Record the error sent to the client; `is_refusal`: the request itself is wrong."""
        is_refused = not self.attempts or (is_refusal and self.first_token_s is None)
        self.outcome = REFUSED if is_refused else FAILED
        self.reason, self.message, self.field = reason, message, message if is_refusal else ""

    def cancel(self) -> None:
        """Record that the client cancelled."""
        self.outcome, self.reason = CANCELLED, "client_left"

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token; None: no token yet."""
        return None if self.first_token_s is None else self.first_token_s - self.begin_s

    @property
    def kv_transfer_bytes(self) -> int:
        """KV bytes transferred, over all attempts whose legs reported it."""
        return sum(attempt.kv_transfer_bytes for attempt in self.attempts)


@dataclass(slots=True, kw_only=True)
class LegTrace(Tokens):
    """Trace of a leg in a worker."""

    request_id: str = ""
    attempt: int = 1
    role: str = ""
    """prefill, decode or aggregated."""
    worker_id: str = ""
    epoch: int = 0
    model: str = ""
    room: int = 0
    """Bootstrap room; 0: aggregated."""
    parent: TraceContext | None = None
    """The attempt's span in the frontend."""
    span_context: TraceContext | None = None
    """Span of this leg; the parent's if nothing is exported."""
    begin_s: float = 0.0
    """When the worker accepted it."""
    end_s: float | None = None
    prompt_tokens: int = 0
    left_s: float | None = None
    """When the caller's cancellation was noticed."""
    engine_finish: EngineFinish | None = None
    """With the engine's times and usage; None: it did not finish."""
    outcome: str = ""
    """FINISHED, FAILED, REFUSED or CANCELLED; empty while it runs."""
    reason: str = ""
    message: str = ""
    """As in `RequestTrace`."""
    field: str = ""
    """As in `RequestTrace`."""

    def finish(self, finish: EngineFinish) -> None:
        """Record the finish of the engine."""
        self.engine_finish = finish
        self.outcome, self.reason = FINISHED, finish.reason.value

    def fail(self, reason: str, message: str, *, is_refusal: bool = False) -> None:
        """Record the error sent to the caller; `is_refusal`: the request itself is wrong, and the worker is not."""
        self.outcome, self.reason, self.message = REFUSED if is_refusal else FAILED, reason, message
        self.field = message if is_refusal else ""

    def cancel(self) -> None:
        """Record that the caller cancelled."""
        self.outcome, self.reason = CANCELLED, "client_left"
