"""Prefill backlog: how long the prompts that workers have would keep them busy, and so whether one more may go.

Pure: the clock is not read, times are the engines' own. A prompt that waits in an engine holds its place there whatever
comes later, and decode's engine counts the wait against its hand-over timeout; one that waits in the frontend's queue
does neither. The rate of a worker is learnt from the finishes of its prefill legs. Routing reads the same figures;
aggregated workers are counted for it alone, and never limited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from tandem.api.types.v1 import leg_pb2
from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import LEG_CONTRACT, EngineLoad, Start, Worker, WorkerRole, WorkerState

PROMPT_COST_TOKENS = 64
"""A prompt costs its tokens and these: computing a single token takes as long as computing some dozens."""
UNMEASURED_PROMPTS_MAX = 2
"""Prompts sent to a worker whose rate is not known yet."""
RATE_WINDOW_S = 10.0
"""Busy seconds after which a measurement weighs a third."""
RATE_KEPT_S = 60.0
"""A rate counts for routing until other workers have finished prompts for so long: otherwise a worker measured on a bad
moment would get no prompt, and so no other measurement, for ever."""
FAIR_FRACTION = 0.25
"""A frontend with less work at a worker than all others together may exceed the limit by this fraction: otherwise a
late starter would never get its share, because every frontend replaces its own prompts as they finish."""


class LocalPrompts(Protocol):
    """Decides which prompts aggregated workers compute where prefill workers could; `routing.local_prefill` does."""

    @property
    def max_tokens(self) -> int:
        """Tokens up to which a prompt is short."""
        ...

    def may_take(self, prompt_tokens: int, reserved_tokens: float, wait_s: float) -> bool:
        """Whether some aggregated worker has time for a prompt that would wait for `wait_s` at prefill.

        `reserved_tokens` are those of prompts that are sent at any moment now.
        """
        ...


@dataclass(slots=True)
class WorkerBacklog:
    """One worker that computes prompts. Costs in tokens."""

    start: Start

    own: float = 0.0
    """Cost of this frontend's unfinished prompts there."""
    own_whole: float = 0.0
    """The same without regard to prefix caches, as load reports count prompts."""
    own_count: int = 0
    is_counted: bool = True
    """False once it has left the view."""
    recent: float = 0.0
    """The part of `own` that was sent after the last load report."""
    reported: float | None = None
    """What waited at the last report, of all frontends, less what this one's finished prompts cost since."""
    others: float = 0.0
    """The other frontends' part of `reported`, as of the report."""
    others_unfinished: float | None = None
    """Cost of the other frontends' unfinished prompts as the worker counts them, as of the report, for routing; None:
    it does not. More than `others`: also what is computed, is on its way, or waits for decode's memory."""
    others_count: int = 0
    """How many these are."""
    computed_tokens: float = 0.0
    busy_s: float = 0.0
    last_end_s: float = 0.0
    is_rate_old: bool = False
    """See RATE_KEPT_S."""
    has_finished: bool = False
    """Whether a prompt has finished there, with times that can be measured or without."""

    @property
    def tokens_per_s(self) -> float | None:
        """Its measured rate; None without a measurement."""
        return self.computed_tokens / self.busy_s if self.busy_s > 0 else None

    @property
    def recent_tokens_per_s(self) -> float | None:
        """Its rate if that was measured lately; None otherwise."""
        return None if self.is_rate_old else self.tokens_per_s

    @property
    def is_known(self) -> bool:
        """Whether a current load report says what waits there."""
        return self.reported is not None

    @property
    def work(self) -> float:
        """Cost of what waits there or is being computed, as far as this frontend knows.

        A report without the worker's own count has only what waits, so at least this frontend's own prompts count.
        """
        if self.others_unfinished is not None:
            return self.own + self.others_unfinished
        return max(self.own, self.backlog)

    def note(self, load: EngineLoad | None) -> None:
        """Record a load report; None: unknown."""
        self.recent = self.others = 0.0
        self.reported, self.others_unfinished, self.others_count = None, None, 0
        if load is None:
            return
        if load.unfinished is not None:
            # In the unit of `own`: the worker counts what each frontend expects to be computed.
            unfinished = load.unfinished.tokens + PROMPT_COST_TOKENS * load.unfinished.count
            self.others_unfinished = max(0.0, unfinished - self.own)
            self.others_count = max(0, load.unfinished.count - self.own_count)
        if load.waiting_tokens is not None:
            reported = max(0, load.waiting_tokens) + PROMPT_COST_TOKENS * max(0, load.waiting_requests or 0)
            self.others = max(0.0, reported - self.own_whole)
            self.reported = min(float(reported), self.own + self.others)

    @property
    def backlog(self) -> float:
        """Cost of what it still has to compute, as far as this frontend knows."""
        return self.own if self.reported is None else min(self.reported, self.own + self.others) + self.recent

    def measure(self, cost: float, start_s: float, end_s: float) -> None:
        """Add a computed prompt. The engine computes several at a time, so only new time counts.

        One that ended before another that is counted is dropped, because the two times may overlap:
        an aggregated worker finishes a request, and reports its times, long after its prompt.
        """
        if end_s < self.last_end_s:
            return
        if self.is_rate_old:
            # Else one prompt that hung for some seconds would outweigh a thousand that come afterwards, one a minute.
            self.computed_tokens = self.busy_s = 0.0
        elapsed_s = max(0.0, end_s - max(start_s, self.last_end_s))
        self.last_end_s = max(self.last_end_s, end_s)
        keep = math.exp(-elapsed_s / RATE_WINDOW_S)
        self.computed_tokens = self.computed_tokens * keep + cost
        self.busy_s = self.busy_s * keep + elapsed_s


class PrefillBacklog:
    """The backlog of all prefill workers of one model."""

    def __init__(self, model: str, limit_s: float) -> None:
        """`limit_s`: seconds of work that may wait at one worker; further prompts wait in the frontend."""
        self._model = model
        self._limit_s = limit_s
        self._view = KnownView()
        self._workers: dict[Start, WorkerBacklog] = {}
        self._aggregated: dict[Start, WorkerBacklog] = {}
        self.watch: Callable[[WorkerBacklog], None] = lambda worker: None
        """Called with each worker whose figures have changed."""
        self.local: LocalPrompts | None = None
        """None: aggregated workers may take any prompt."""
        self._measured: dict[Start, float] = {}
        """When the last prompt of each measured worker ended, in about that order."""
        self._reserved = 0.0
        """Cost of the requests that have a slot and whose legs are not sent yet."""
        self._reserved_count = 0
        self._own_count = 0
        """Unfinished prompts at all workers."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new registry view."""
        removed, added = self._view.replace(workers)
        for worker in removed:
            self._measured.pop(worker.start, None)
            gone = self._workers.pop(worker.start, None)
            if gone is not None:
                self._own_count -= gone.own_count
                gone.is_counted = False
            gone = self._aggregated.pop(worker.start, None)
            if gone is not None:
                gone.is_counted = False
        for worker in added:
            if not self._serves(worker):
                continue
            if worker.role is WorkerRole.PREFILL:
                self._workers[worker.start] = WorkerBacklog(worker.start)
            elif worker.role is WorkerRole.AGGREGATED:
                self._aggregated[worker.start] = WorkerBacklog(worker.start)

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Record a worker's load; None: unknown."""
        worker = self.get(start)
        if worker is None:
            return
        worker.note(load)
        self.watch(worker)

    def get(self, start: Start) -> WorkerBacklog | None:
        """The figures of a worker; None: it computes no prompts, or is not in the view."""
        return self._workers.get(start) or self._aggregated.get(start)

    @property
    def aggregated(self) -> Iterable[Start]:
        """The aggregated workers of the model."""
        return self._aggregated

    @property
    def short_tokens(self) -> int:
        """Tokens up to which a prompt may overtake those that wait for a prefill worker; 0: none may."""
        return self.local.max_tokens if self.local is not None and self._aggregated else 0

    def has_room(self, prompt_tokens: int = 0) -> bool:
        """Whether some prefill worker is near enough to its next prompt. True where none is needed or known.

        Each frontend may always have one prompt at work, so that none of them starves.
        """
        if not self._workers or not self._reserved_count + self._own_count:
            return True
        if self._aggregated and (
            self.local is None or self.local.may_take(prompt_tokens, self._reserved, self._limit_s)
        ):
            return True
        reserved, count = self._reserved / len(self._workers), self._reserved_count / len(self._workers)
        return any(self._is_near(worker, reserved, count) for worker in self._workers.values())

    def reserve(self, prompt_tokens: int, changed: Callable[[], None] = lambda: None) -> PrefillWork:
        """Count a prompt that has got its slot. `changed` is called when room may have come free."""
        work = PrefillWork(self, prompt_tokens + PROMPT_COST_TOKENS, prompt_tokens + PROMPT_COST_TOKENS, changed)
        self._reserved += work.cost
        self._reserved_count += 1
        return work

    def _is_near(self, worker: WorkerBacklog, reserved: float, reserved_count: float) -> bool:
        rate = worker.tokens_per_s
        if rate is None:
            # An engine that reports no times, or none that differ, is not limited here: its own timeout is.
            return worker.has_finished or worker.own_count + reserved_count < UNMEASURED_PROMPTS_MAX
        limit_s = self._limit_s
        if worker.own < worker.others:
            limit_s *= 1 + FAIR_FRACTION
        return worker.backlog + reserved < limit_s * rate

    def _serves(self, worker: Worker) -> bool:
        return (
            worker.state is WorkerState.SERVING
            and worker.leg_contract == LEG_CONTRACT
            and worker.capabilities.model == self._model
        )

    # --- For PrefillWork

    def unreserve(self, cost: float) -> None:
        """A reserved prompt has been sent, or its request has ended."""
        self._reserved_count -= 1
        self._reserved = self._reserved - cost if self._reserved_count else 0.0

    def sent(self, start: Start, cost: float, whole_cost: float) -> WorkerBacklog | None:
        """A prompt has been sent to a worker; None: the worker is not counted."""
        worker = self.get(start)
        if worker is not None:
            worker.own += cost
            worker.own_whole += whole_cost
            worker.own_count += 1
            worker.recent += cost
            self._own_count += start in self._workers
            self.watch(worker)
        return worker

    def measured(self, worker: WorkerBacklog) -> None:
        """A worker's rate has been measured."""
        worker.is_rate_old = False
        if worker.is_counted:
            self._measured.pop(worker.start, None)
            self._measured[worker.start] = worker.last_end_s
        while self._measured:
            start, end_s = next(iter(self._measured.items()))
            if worker.last_end_s - end_s <= RATE_KEPT_S:
                break
            del self._measured[start]
            old = self.get(start)
            if old is not None:
                old.is_rate_old = True
                self.watch(old)
        self.watch(worker)

    def finished(self, worker: WorkerBacklog) -> None:
        """A prompt of a worker needs no more prefill."""
        worker.own_count -= 1
        if worker.is_counted:
            self._own_count -= worker.start in self._workers


@dataclass(slots=True)
class PrefillWork:
    """One prompt: reserved, sent to a worker (again at each new attempt), computed or dropped."""

    _backlog: PrefillBacklog
    _whole_cost: float
    """Without a prefix cache."""
    cost: float
    """As expected where it was sent."""
    _changed: Callable[[], None]
    _is_reserved: bool = True
    _worker: WorkerBacklog | None = field(default=None, repr=False)
    """Where it is at work."""
    _measured_at: WorkerBacklog | None = field(default=None, repr=False)
    """Where its finish will be measured."""

    def sent(self, start: Start | None, cached_tokens: int = 0) -> None:
        """Its legs go to the worker `start`, which should have `cached_tokens` of it in its prefix cache.

        None: to a worker that is not counted.
        """
        self.drop()
        self.cost = max(float(PROMPT_COST_TOKENS), self._whole_cost - cached_tokens)
        self._worker = self._measured_at = (
            None if start is None else self._backlog.sent(start, self.cost, self._whole_cost)
        )

    def computed(self, finish: leg_pb2.LegFinish | None = None) -> None:
        """Prefill has computed it. `finish`: of its leg, once that is known; may come after the first token."""
        if finish is not None and self._measured_at is not None:
            timings = finish.timings
            self._measured_at.has_finished = True
            if timings.HasField("prefill_start_time") and timings.HasField("prefill_end_time"):
                start_s, end_s = _seconds(timings.prefill_start_time), _seconds(timings.prefill_end_time)
                # What the engine computed, whatever was expected.
                cost = max(float(PROMPT_COST_TOKENS), self._whole_cost - finish.usage.cached_tokens)
                self._measured_at.measure(cost, start_s, end_s)
                self._backlog.measured(self._measured_at)
            self._measured_at = None
        self.drop()

    def drop(self) -> None:
        """It needs no more prefill. May be called twice."""
        if self._is_reserved:
            self._is_reserved = False
            self._backlog.unreserve(self.cost)
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self._backlog.finished(worker)
        worker.own = worker.own - self.cost if worker.own_count else 0.0
        worker.own_whole = worker.own_whole - self._whole_cost if worker.own_count else 0.0
        if worker.reported is not None:
            # What finishes first was sent first: it was in the report, as long as the report had any.
            worker.recent -= max(0.0, self.cost - worker.reported)
            worker.recent, worker.reported = max(0.0, worker.recent), max(0.0, worker.reported - self.cost)
        self._backlog.watch(worker)
        self._changed()


def _seconds(time: Timestamp) -> float:
    return time.seconds + time.nanos / 1e9
