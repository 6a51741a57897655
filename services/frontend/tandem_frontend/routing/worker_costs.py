"""What the workers have to do, as costs of one more request: read by the policies, updated with each event.

Pure. Computing a prompt costs seconds: the uncached tokens that wait and are computed, by the worker's measured rate.
Streaming costs shares of a decode worker: of its KV memory and of the requests that it may run. Both are the worker's
last load report with this frontend's own requests since; an absent or expired report is unknown, see `cost_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole, WorkerState
from tandem_frontend.admission.prefill_backlog import PROMPT_COST_TOKENS, PrefillBacklog, WorkerBacklog
from tandem_frontend.routing.cost_table import CostTable, Row
from tandem_frontend.routing.policy import Job


@dataclass(slots=True)
class _Streams:
    """What a decode or aggregated worker holds."""

    request_tokens: float
    """KV memory divided by the requests that it may run: a request without tokens counts as much."""
    per_token: float
    own_requests: int = 0
    """Of this frontend."""
    own_tokens: float = 0.0
    reported_requests: float | None = None
    """As of the last report, less this frontend's requests that have ended since; None: unknown."""
    reported_tokens: float = 0.0
    recent_requests: int = 0
    """The part of `own_requests` sent after the last report."""
    recent_tokens: float = 0.0
    report: int = 0
    """Number of the last report."""


class WorkerCosts:
    """The costs of all workers of the view, for both jobs."""

    def __init__(self, backlog: PrefillBacklog, clock: Clock = monotonic) -> None:
        """Gives each view and load to `backlog` too, and watches its figures."""
        self.tables = {Job.COMPUTE: CostTable(clock), Job.STREAM: CostTable(clock)}
        self._clock = clock
        self._in_hand: dict[str, tuple[int, float]] = {}
        """By worker that computes prompts: unfinished ones of this frontend, and since when it has the first of any
        frontend in hand, as far as known."""
        self._backlog = backlog
        self._view = KnownView()
        self._streams: dict[Start, _Streams] = {}
        self.epochs: dict[str, int] = {}
        """Of the workers that have costs."""
        backlog.watch = self._price_prompts

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new registry view."""
        workers = tuple(workers)
        self._backlog.follow(workers)
        removed, added = self._view.replace(workers)
        for worker in removed:
            self._streams.pop(worker.start, None)
            if self.epochs.get(worker.worker_id) == worker.epoch:
                del self.epochs[worker.worker_id]
                self._in_hand.pop(worker.worker_id, None)
                for table in self.tables.values():
                    table.remove(worker.worker_id)
        for worker in added:
            if worker.state is WorkerState.SERVING:
                self._add(worker)

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Record a worker's load; None: unknown."""
        if load is not None and load.unfinished is not None and self.epochs.get(start[0]) == start[1]:
            own_count = self._in_hand.get(start[0], (0, 0.0))[0]
            self._in_hand[start[0]] = own_count, self._clock() - load.unfinished.in_hand_s
        self._backlog.note(start, load)
        streams = self._streams.get(start)
        if streams is None:
            return
        streams.report += 1
        streams.recent_requests, streams.recent_tokens, streams.reported_requests = 0, 0.0, None
        if load is not None and load.running_requests is not None:
            counts = load.running_requests, load.waiting_requests or 0, load.transferring_requests or 0
            streams.reported_requests = float(sum(max(0, count) for count in counts))
            streams.reported_tokens = float(max(0, load.kv_used_tokens or 0))
        self._price_streams(start, streams)

    def sent(self, computing: Worker, streaming: Worker, tokens: int, cached_tokens: int) -> SentRequest:
        """Count a request that is being sent. The backlog counts its prompt by itself."""
        self.tables[Job.COMPUTE].assign(computing.worker_id, max(0, tokens - cached_tokens))
        self.tables[Job.STREAM].assign(streaming.worker_id, tokens)
        start, streams = streaming.start, self._streams.get(streaming.start)
        if streams is None:
            return SentRequest(self, start, _Streams(1.0, 1.0), 0)
        streams.own_requests += 1
        streams.own_tokens += tokens
        streams.recent_requests += 1
        streams.recent_tokens += tokens
        self._price_streams(start, streams)
        return SentRequest(self, start, streams, tokens)

    def ended(self, start: Start, streams: _Streams, tokens: int, report: int) -> None:
        """A counted request has ended; `report` is the number of the last report when it was sent."""
        if self._streams.get(start) is not streams:
            return
        streams.own_requests -= 1
        streams.own_tokens = streams.own_tokens - tokens if streams.own_requests else 0.0
        if streams.report == report:
            streams.recent_requests -= 1
            streams.recent_tokens = streams.recent_tokens - tokens if streams.recent_requests else 0.0
        elif streams.reported_requests is not None:
            streams.reported_requests = max(0.0, streams.reported_requests - 1)
            streams.reported_tokens = max(0.0, streams.reported_tokens - tokens)
        self._price_streams(start, streams)

    def _add(self, worker: Worker) -> None:
        self.epochs[worker.worker_id] = worker.epoch
        if worker.role is not WorkerRole.DECODE:
            self.tables[Job.COMPUTE].add(worker.worker_id, Row(PROMPT_COST_TOKENS))
            backlog = self._backlog.get(worker.start)
            if backlog is not None:
                self._price_prompts(backlog)
        if worker.role is not WorkerRole.PREFILL:
            capacity = max(1, worker.capabilities.kv_capacity_tokens)
            request_tokens = capacity / max(1, worker.capabilities.running_requests_max)
            streams = self._streams[worker.start] = _Streams(request_tokens, 1 / capacity)
            self.tables[Job.STREAM].add(worker.worker_id, Row(request_tokens, per_token=1 / capacity))
            self._price_streams(worker.start, streams)

    def _price_prompts(self, worker: WorkerBacklog) -> None:
        if self.epochs.get(worker.start[0]) != worker.start[1]:
            return
        rate, others_count = worker.recent_tokens_per_s, worker.others_count
        count_before, since_s = self._in_hand.get(worker.start[0], (0, 0.0))
        if worker.own_count < count_before or not count_before + others_count:
            # The engine takes the next one when one is done, or at once.
            since_s = self._clock()
        self._in_hand[worker.start[0]] = worker.own_count, since_s
        count = worker.own_count + others_count
        counted = worker.own + (worker.others_unfinished or 0.0)
        self.tables[Job.COMPUTE].update(
            worker.start[0],
            work=worker.work,
            own=worker.own,
            per_token=None if rate is None else 1 / rate,
            is_known=worker.is_known,
            # Without others' prompts: a report that was on its way while this frontend's own one ended has that one.
            requests=worker.own_count,
            since_s=since_s,
            in_hand=counted / count if count else 0.0,
        )

    def _price_streams(self, start: Start, streams: _Streams) -> None:
        if self.epochs.get(start[0]) != start[1]:
            return
        requests, tokens = float(streams.own_requests), streams.own_tokens
        own = tokens + requests * streams.request_tokens
        if streams.reported_requests is not None:
            requests = max(requests, streams.reported_requests + streams.recent_requests)
            tokens = max(tokens, streams.reported_tokens + streams.recent_tokens)
        self.tables[Job.STREAM].update(
            start[0],
            work=tokens + requests * streams.request_tokens,
            own=own,
            per_token=streams.per_token,
            is_known=streams.reported_requests is not None,
            requests=requests,
        )


class SentRequest:
    """One request at the worker that streams it."""

    __slots__ = ("_costs", "_is_over", "_report", "_start", "_streams", "_tokens", "on_end")

    def __init__(self, costs: WorkerCosts, start: Start, streams: _Streams, tokens: int) -> None:
        self._costs = costs
        self._start = start
        self._streams = streams
        self._tokens = tokens
        self._report = streams.report
        self._is_over = False
        self.on_end: Callable[[], None] | None = None
        """Called once, at its end."""

    def end(self) -> None:
        """It has ended there. May be called twice."""
        if not self._is_over:
            self._is_over = True
            self._costs.ended(self._start, self._streams, self._tokens, self._report)
            if self.on_end is not None:
                self.on_end()
