"""The course of a request: one record of what happened to it and when, written on the way, read when it closes.

Everything that is told of a request (spans, metrics, its line in the log, `tandem trace`) is derived from this one
record. Times are seconds since the Unix epoch on this process's clock. No token id and no secret enters it, and no
prompt unless the operator has asked for that.
Writing costs a few attribute sets for each attempt and one call for each batch of tokens; nothing is computed here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.api.types.v1 import leg_pb2
from tandem.clock import SteadyTime
from tandem.domain.generation import EngineFinish
from tandem.domain.worker import Worker
from tandem.observability.trace_context import TraceContext

FINISHED, FAILED, REFUSED, CANCELLED = "finished", "failed", "refused", "cancelled"
"""How a course ends. Refused: before any worker was asked. Cancelled: whoever asked has left."""
OUTCOMES = (FINISHED, FAILED, REFUSED, CANCELLED)
BROKEN, ENDED = "broken", "ended"
"""How an attempt ends, besides FINISHED: a leg failed; or it was ended from here, by a stop string or a cancelled
request."""
GAPS_MAX = 4096
"""Times between batches that are kept of one course; later ones are not."""
EVENTS_MAX = 64


def _gaps() -> array[float]:
    return array("f")


@dataclass(slots=True, kw_only=True)
class Tokens:
    """When tokens came."""

    clock: Callable[[], float] = field(default_factory=SteadyTime)
    """The time of day, which goes on evenly from the first look at it: a clock that is set changes no order."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    token_count: int = 0
    gaps_s: array[float] = field(default_factory=_gaps)
    """Between a batch of tokens and the next one, in order; the first GAPS_MAX."""

    def note_tokens(self, now_s: float, count: int) -> None:
        """A batch of tokens has come. On the hot path: once for each batch."""
        if self.last_token_s is None:
            self.first_token_s = now_s
        elif len(self.gaps_s) < GAPS_MAX:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s
        self.token_count += count


@dataclass(slots=True)
class Step:
    """A step that the frontend makes by itself: admit, tokenise, wait, route."""

    name: str
    begin_s: float
    end_s: float
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """Something that happened at a moment."""

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
    """One attempt: both legs, as the frontend saw them."""

    number: int = 1
    clock: Callable[[], float] = field(default_factory=SteadyTime)
    span_context: TraceContext | None = None
    """Its own span, which is the parent of its legs'; the caller's where nothing is exported."""
    room: int = 0
    """Where its legs meet; 0: it has one leg only."""
    prefill_worker: Worker | None = None
    decode_worker: Worker | None = None
    """Also the aggregated one."""
    candidates_count: int = 0
    """Pairs and aggregated workers that were possible."""
    candidates: str = ""
    """Some of them, by name."""
    policy: str = ""
    """Which policy has chosen this pair."""
    why: str = ""
    """Why this one."""
    begin_s: float = 0.0
    """Its legs were sent."""
    prefill_accepted_s: float | None = None
    decode_accepted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    tokens_before: int = 0
    """Tokens the client had before it: more than none in a continuation."""
    outcome: str = ""
    """FINISHED, BROKEN or ENDED; empty while it runs."""
    failed_leg: str = ""
    failed_worker: Worker | None = None
    phase: str = ""
    """Where the leg was that broke."""
    reason: str = ""
    """ErrorInfo's, of the failure."""
    prefill_finish: leg_pb2.LegFinish | None = None
    decode_finish: leg_pb2.LegFinish | None = None

    def accepted(self, leg: str) -> None:
        """A worker has taken its leg: prefill, decode or aggregated."""
        if leg == "prefill":
            self.prefill_accepted_s = self.clock()
        else:
            self.decode_accepted_s = self.clock()

    def broke(self, leg: str, worker: Worker, phase: str, reason: str) -> None:
        """A leg failed, and the attempt with it. The first failure counts."""
        if not self.failed_leg:
            self.failed_leg, self.failed_worker, self.phase, self.reason = leg, worker, phase, reason

    def end(self, prefill: leg_pb2.LegFinish | None, decode: leg_pb2.LegFinish | None) -> None:
        """Both legs have ended, with these accounts of theirs."""
        self.end_s = self.clock()
        self.prefill_finish, self.decode_finish = prefill, decode
        self.outcome = FINISHED if decode is not None else BROKEN if self.failed_leg else ENDED

    @property
    def kv_transfer_bytes(self) -> int:
        """KV bytes that moved between its legs; 0 before `end` and where neither leg reported any."""
        return kv_transfer_bytes(self.prefill_finish, self.decode_finish) or 0


@dataclass(slots=True, kw_only=True)
class RequestTrace(Tokens):
    """A request on its way through the frontend, over all its attempts."""

    request_id: str = ""
    call_id: str = ""
    """x-request-id of the call it came with, where there is one; several requests may share it."""
    operation: str = "generate"
    """Or chat, or text_completion."""
    model: str = ""
    tenant: str = ""
    parent: TraceContext | None = None
    """The caller's span."""
    span_context: TraceContext | None = None
    """This request's own span; the caller's where nothing is exported."""
    begin_s: float = 0.0
    end_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    max_tokens: int | None = None
    prompt: str | None = None
    """Only where the operator has asked for it (`trace_prompts`)."""
    left_s: float | None = None
    """The client's leaving was seen, while it had legs."""
    steps: list[Step] = field(default_factory=list)
    attempts: list[AttemptTrace] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    outcome: str = ""
    """One of OUTCOMES; empty while it runs."""
    reason: str = ""
    """The FinishReason's name in small letters, or ErrorInfo's reason."""
    message: str = ""
    """The failure's sentence; of a refused value the name of its field."""

    def step(self, name: str, begin_s: float, **attributes: Any) -> float:
        """A step of the frontend's has ended now; returns now."""
        now_s = self.clock()
        self.steps.append(Step(name, begin_s, now_s, attributes))
        return now_s

    def event(self, name: str, **attributes: Any) -> None:
        """Something has happened now."""
        if len(self.events) < EVENTS_MAX:
            self.events.append(Event(name, self.clock(), attributes))

    def add_attempt(self, attempt: AttemptTrace) -> AttemptTrace:
        """Another attempt begins."""
        self.attempts.append(attempt)
        return attempt

    def note_tokens(self, now_s: float, count: int) -> None:
        """A batch of tokens has come, of the present attempt."""
        # Not super(): with slots it costs as much again as the call itself.
        Tokens.note_tokens(self, now_s, count)
        if self.attempts:
            attempt = self.attempts[-1]
            attempt.last_token_s = now_s
            if attempt.first_token_s is None:
                attempt.first_token_s = now_s

    def finish(self, reason: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> None:
        """The client gets its finish."""
        self.outcome, self.reason = FINISHED, reason
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.cached_tokens = cached_tokens

    def fail(self, reason: str, message: str) -> None:
        """The client gets an error."""
        self.outcome = FAILED if self.attempts else REFUSED
        self.reason, self.message = reason, message

    def cancel(self) -> None:
        """The client has left."""
        self.outcome, self.reason = CANCELLED, "client_left"

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to the first token; None when there was none."""
        return None if self.first_token_s is None else self.first_token_s - self.begin_s

    @property
    def kv_transfer_bytes(self) -> int:
        """KV bytes that moved, summed over all attempts."""
        return sum(attempt.kv_transfer_bytes for attempt in self.attempts)


@dataclass(slots=True, kw_only=True)
class LegTrace(Tokens):
    """A leg on its way through a worker."""

    request_id: str = ""
    attempt: int = 1
    role: str = ""
    """prefill, decode or aggregated."""
    worker_id: str = ""
    epoch: int = 0
    model: str = ""
    room: int = 0
    """0: it has no peer."""
    parent: TraceContext | None = None
    """The attempt's span in the frontend."""
    span_context: TraceContext | None = None
    """This leg's own span; the parent's where nothing is exported."""
    begin_s: float = 0.0
    """Accepted."""
    end_s: float | None = None
    prompt_tokens: int = 0
    left_s: float | None = None
    """The caller's leaving was seen."""
    engine_finish: EngineFinish | None = None
    """With the engine's own times and usage; None when it did not finish."""
    outcome: str = ""
    """FINISHED, FAILED or CANCELLED; empty while it runs."""
    reason: str = ""
    message: str = ""

    def finish(self, finish: EngineFinish) -> None:
        """The engine has ended it."""
        self.engine_finish = finish
        self.outcome, self.reason = FINISHED, finish.reason.value

    def fail(self, reason: str, message: str) -> None:
        """The caller gets an error."""
        self.outcome, self.reason, self.message = FAILED, reason, message

    def cancel(self) -> None:
        """The caller has left."""
        self.outcome, self.reason = CANCELLED, "client_left"
