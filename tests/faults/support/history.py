"""What a load has met, request by request: when it began, who served it, how it ended, which tokens came.

Owns the record and its arithmetic. Asks for nothing and judges nothing: `steady_load` writes it, `verdicts` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tandem.errors import TandemError

now_s = time.monotonic
"""The clock of every history. Faults are dated with it too, so that the two can be compared."""


@dataclass(slots=True)
class Asked:
    """One request, as the client saw it."""

    number: int
    frontend: str
    """host:port it was asked at."""
    prompt: tuple[int, ...]
    max_tokens: int
    start_s: float
    accepted_s: float | None = None
    """When both legs were taken; None: not yet, or never."""
    end_s: float | None = None
    """None: still open."""
    attempt: int | None = None
    """Which attempt was taken, from 1. More than 1: a worker chosen before did not take its leg."""
    workers: tuple[str, ...] = ()
    """Prefill and decode worker that took it."""
    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    """When each of them came."""
    finish_count: int = 0
    """How often the stream said that it is whole: once, or it failed."""
    last_attempt: int | None = None
    """Which attempt finished it; more than `attempt`: it broke after it was taken and was begun again or continued."""
    misplaced_count: int = 0
    """Chunks that did not begin where the one before ended."""
    failure: TandemError | None = None

    @property
    def went_on(self) -> bool:
        """Whether workers that had it lost it, and others took it."""
        return self.last_attempt is not None and self.attempt is not None and self.last_attempt > self.attempt

    def gap_after_s(self, fault_s: float) -> float | None:
        """From a fault, or from the last token before the next where some still came, to the first token of the rest.

        The longest pause between two events that ends after the fault; None: nothing came after it.
        """
        heard = [self.accepted_s or self.start_s, *self.token_times_s]
        pauses = [later - max(earlier, fault_s) for earlier, later in pairwise(heard) if later > fault_s]
        return max(pauses, default=None)

    def runs_at(self, time_s: float) -> bool:
        """Whether its workers had it at that moment."""
        return self.accepted_s is not None and self.accepted_s <= time_s and (self.end_s is None or self.end_s > time_s)

    def summary(self) -> str:
        """One line for the message of a failed test."""
        ending = "open" if self.end_s is None else f"ended after {self.end_s - self.start_s:.2f} s"
        came = f"{len(self.tokens)} of {self.max_tokens} tokens"
        return f"request {self.number} at {self.frontend} by {self.workers}: {ending}, {came}, {self.failure!r}"


class History:
    """All requests of one load, in the order in which they were asked."""

    def __init__(self, asked: Iterable[Asked] = ()) -> None:
        self.asked: list[Asked] = list(asked)

    def __len__(self) -> int:
        return len(self.asked)

    def where(self, wanted: Callable[[Asked], bool]) -> History:
        """Those that fit."""
        return History(asked for asked in self.asked if wanted(asked))

    def begun(self, from_s: float, to_s: float = float("inf")) -> History:
        """Those asked within a span of time."""
        return self.where(lambda asked: from_s <= asked.start_s < to_s)

    def running_at(self, time_s: float) -> History:
        """Those whose workers had them at a moment."""
        return self.where(lambda asked: asked.runs_at(time_s))

    def failed(self) -> History:
        """Those that ended with an error."""
        return self.where(lambda asked: asked.failure is not None)

    def served_by(self, worker_id: str) -> History:
        """Those one of whose legs that worker took."""
        return self.where(lambda asked: worker_id in asked.workers)

    def led_astray(self) -> History:
        """Those of which an attempt was sent to a worker that did not take it."""
        return self.where(lambda asked: (asked.attempt or 0) > 1 or _was_refused(asked.failure))

    def last_start_s(self) -> float | None:
        """When the last of them began; None of an empty history."""
        return max((asked.start_s for asked in self.asked), default=None)

    def lines(self, most: int = 5) -> str:
        """The first few of them, for a message."""
        more = f"\n... and {len(self) - most} more" if len(self) > most else ""
        return "\n".join(asked.summary() for asked in self.asked[:most]) + more


def _was_refused(failure: TandemError | None) -> bool:
    return failure is not None and failure.metadata.get("phase") == "dispatched"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
