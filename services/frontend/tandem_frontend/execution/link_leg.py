"""One leg of a link as its owner and the link hold it, and what its owner must be to hear of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.errors import TandemError

log = logging.getLogger(__name__)

Logprobs = Sequence[generation_pb2.TokenLogprob]
STARTS_BYTES_MAX = 4 * 2**20
"""Of one call; one leg may be longer. Workers refuse calls of 16 MiB."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a worker may say nothing, in seconds of this process's own running time."""

    accept_s: float
    """Until it has taken a leg."""
    silence_s: float
    """Between two messages, while legs of this frontend run there. Workers speak several times within it."""
    slow_s: float = 0.8
    """After so much of either the worker is asked whether it lives. A healthy one takes a leg at once and names silent
    legs four times in this time."""


class Sink(Protocol):
    """What hears of a leg. Called on the event loop; must not block."""

    def accepted(self) -> None:
        """The worker has taken the leg. Tokens may have come before."""
        ...

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens; `index` is the place of the first one, as the worker says."""
        ...

    def finish(self, finish: leg_pb2.LegFinish) -> None:
        """The end, by itself or by an abort that another caller asked for."""
        ...

    def fail(self, problem: TandemError) -> None:
        """The end by a failure."""
        ...

    def unanswered(self) -> None:
        """The worker is slow to speak, and has not answered a question about its health either."""
        ...


class Leg:
    """One leg of a link, as its owner holds it."""

    __slots__ = ("_abort", "is_named", "is_sent", "is_started", "missed_count", "number", "sink", "start")

    def __init__(self, number: int, sink: Sink, start: leg2_pb2.LegStart, abort: Callable[[Leg], None]) -> None:
        """`abort` is the link's."""
        self._abort = abort
        self.number = number
        self.sink: Sink | None = sink
        """None: its owner does not want it any more, and it has not ended yet."""
        self.start: leg2_pb2.LegStart | None = start
        """What is to be sent; None once it has been."""
        self.is_sent = False
        self.is_started = False
        self.is_named = True
        """Whether the worker has named it since the last look."""
        self.missed_count = 0

    def abort(self) -> None:
        """End the leg in its engine; its sink hears nothing more. Harmless after its end."""
        if self.sink is not None:
            self.sink = None
            self._abort(self)

    def fail(self, problem: TandemError) -> None:
        """End the leg here: its sink hears why, and nothing more."""
        sink, self.sink = self.sink, None
        if sink is not None:
            tell_failed(sink, problem)


def tell_failed(sink: Sink, problem: TandemError) -> None:
    """Give a sink its end. A sink that raises is no other leg's business."""
    try:
        sink.fail(problem)
    except Exception as defect:
        log.error("a sink could not take the failure of its leg: %s", problem, exc_info=defect)


def copied(problem: TandemError) -> TandemError:
    """The same error, which takes in facts of its own."""
    copy = problem.__class__.__new__(problem.__class__)
    copy.__dict__.update(problem.__dict__)
    copy.args, copy.metadata = problem.args, dict(problem.metadata)
    return copy


def batch(legs: Sequence[Leg]) -> tuple[list[Leg], list[Leg]]:
    """The first legs, as many as go into one call, and the others."""
    size_bytes = 0
    for place, leg in enumerate(legs):
        assert leg.start is not None, "a leg is sent once"
        size_bytes += leg.start.ByteSize()
        if place and size_bytes > STARTS_BYTES_MAX:
            return list(legs[:place]), list(legs[place:])
    return list(legs), []
