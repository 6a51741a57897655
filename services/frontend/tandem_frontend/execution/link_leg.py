"""One leg on a link: the object shared by its owner and the link, and the sink that receives its events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.errors import TandemError
from tandem.observability.trace_context import TRACEPARENT, TRACESTATE, Headers

log = logging.getLogger(__name__)

Logprobs = Sequence[generation_pb2.TokenLogprob]
STARTS_BYTES_MAX = 4 * 2**20
"""Size of one StartLegs call; a single leg may be larger. Workers refuse calls of more than 16 MiB."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Timeouts of a worker, in seconds during which this process itself was running."""

    accept_s: float
    """Until it has accepted a leg."""
    silence_s: float
    """Between two messages, while legs of this frontend run there. Workers send several messages within it."""
    slow_s: float = 0.8
    """After this part of either timeout the worker's health is checked. A healthy one accepts a leg at once, and lists
    the legs without tokens as alive four times within it."""


class Sink(Protocol):
    """Receives the events of a leg. Called on the event loop; must not block."""

    def accepted(self) -> None:
        """The worker has accepted the leg. Tokens may have arrived before."""
        ...

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens; `index` is the position of the first one according to the worker."""
        ...

    def finish(self, finish: leg_pb2.LegFinish) -> None:
        """The leg has finished, or another caller has aborted it."""
        ...

    def fail(self, problem: TandemError) -> None:
        """The leg has failed."""
        ...

    def unresponsive(self) -> None:
        """The worker is slow, and has not responded to a health check either."""
        ...


class TokenSink(Protocol):
    """Receives the tokens of a request."""

    @property
    def is_over(self) -> bool:
        """Whether the client has all tokens, so that a failure from now on does not matter."""
        ...

    @property
    def ends_the_legs(self) -> bool:
        """Whether no more tokens are wanted while the engine would go on generating."""
        ...

    def take(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens, each once."""
        ...


class Leg:
    """One leg of a link."""

    __slots__ = ("_abort", "is_alive", "is_sent", "is_started", "listed_in", "missed_count", "number", "sink", "start")

    def __init__(self, number: int, sink: Sink, start: leg2_pb2.LegStart, abort: Callable[[Leg], None]) -> None:
        """`abort` is the link's."""
        self._abort = abort
        self.number = number
        self.sink: Sink | None = sink
        """None: aborted by its owner or failed here, but not ended by the worker yet."""
        self.start: leg2_pb2.LegStart | None = start
        """The message to be sent; None once it was sent."""
        self.is_sent = False
        self.is_started = False
        """Whether the worker has accepted it, or may have."""
        self.is_alive = True
        """Whether the worker has listed it since the last liveness check."""
        self.listed_in = 0
        """The link's listing in which, or after which, the worker has listed it last; 0: not yet."""
        self.missed_count = 0
        """Liveness checks in a row in which it was not listed."""

    def abort(self) -> None:
        """Abort the leg in its engine; its sink gets no more events. Does nothing after its end."""
        if self.sink is not None:
            self.sink = None
            self._abort(self)

    def fail(self, problem: TandemError) -> None:
        """Fail the leg in this process: its sink gets the error, and no more events."""
        sink, self.sink = self.sink, None
        if sink is not None:
            report_failed(sink, problem)


def report_failed(sink: Sink, problem: TandemError) -> None:
    """Call a sink's `fail`. What it raises is logged, so that it cannot affect other legs."""
    try:
        sink.fail(problem)
    except Exception as defect:  # a defect of one sink must not end the other legs
        log.error(
            "bug in this frontend while it handled a failed leg: that request may end only at its deadline, others are "
            "not affected; the leg's failure was: %s",
            problem, exc_info=defect,
        )  # fmt: skip


def leg_start(number: int, request: leg_pb2.LegRequest, timeout_s: float | None, headers: Headers) -> leg2_pb2.LegStart:
    """The message that starts a leg; `timeout_s` None: no deadline."""
    start = leg2_pb2.LegStart(leg=number, request=request)
    if timeout_s is not None:
        start.timeout.FromNanoseconds(int(timeout_s * 1e9))
    for name, value in headers:
        if name == TRACEPARENT:
            start.traceparent = value
        elif name == TRACESTATE:
            start.tracestate = value
    return start


def bug_in(what: str, worker_id: str, problem: Exception) -> TandemError:
    """Log that a leg's sink has raised, and return the error of that leg."""
    log.error(
        "bug in this frontend while it handled %s of worker %s: that request fails, others do not",
        what, worker_id, exc_info=problem,
    )  # fmt: skip
    return TandemError(f"internal error in a leg: {type(problem).__name__}")


def copied(problem: TandemError) -> TandemError:
    """A copy with metadata of its own."""
    copy = problem.__class__.__new__(problem.__class__)
    copy.__dict__.update(problem.__dict__)
    copy.args, copy.metadata = problem.args, dict(problem.metadata)
    return copy


def batch(legs: Sequence[Leg]) -> tuple[list[Leg], list[Leg]]:
    """Split legs into those of the next StartLegs call, by size, and the rest."""
    size_bytes = 0
    for index, leg in enumerate(legs):
        assert leg.start is not None, "a leg is sent once"
        size_bytes += leg.start.ByteSize()
        if index and size_bytes > STARTS_BYTES_MAX:
            return list(legs[:index]), list(legs[index:])
    return list(legs), []
