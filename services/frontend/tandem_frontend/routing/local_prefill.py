"""Conditional disaggregation: which requests an aggregated worker serves alone where pairs serve the model too.

Owns the rule, and the time that each aggregated worker has given to prompts lately, by which the rule keeps the time
between tokens of the streams there. The policy picks the workers of either kind, `worker_costs` has their work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tandem.clock import Clock, monotonic
from tandem.domain.placement import Placement
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole, WorkerState
from tandem_frontend.admission.prefill_backlog import PROMPT_COST_TOKENS, UNMEASURED_PROMPTS_MAX, PrefillBacklog
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.policy import Job
from tandem_frontend.routing.worker_costs import WorkerCosts

MAX_TOKENS = 512
SHARE = 0.2
WINDOW_S = 2.0
"""Over which the share of prompts counts, older ones less: at most this times the share is given to prompts at once."""
PATIENCE_S = 0.25
"""Wait for a prefill worker up to which the share holds. Beyond it the share grows in proportion, up to the whole time:
a bound that never gives way costs seconds of TTFT where prefill is overloaded, for milliseconds between tokens."""
STREAMS_LEAD = 0.25
"""How much more an aggregated worker may stream than the pair's decode worker, as shares of KV memory and of running
requests together: otherwise decode workers would idle while short prompts with long answers fill it."""
OTHERS_KEEP = 0.5
"""Weight of what was known of the other frontends' prompts a second ago, when a load report adds to it."""


@dataclass(frozen=True, slots=True)
class LocalPrefillSettings:
    """Settings of the rule; the frontend's have the same names with the prefix `local_prefill_`."""

    max_tokens: int = MAX_TOKENS
    """Uncached prompt tokens up to which a prompt is short."""
    share: float = SHARE
    """Of an aggregated worker's time, for prompts; above 0, at most 1."""


@dataclass(slots=True)
class _PromptTime:
    """What one aggregated worker has given to prompts."""

    spent_s: float = 0.0
    """Seconds that this frontend's prompts take there, older ones weighted less."""
    at_s: float = 0.0
    """When that was so."""
    others_share: float = 0.0
    """Share of its time for the prompts of other frontends, smoothed; may be a little below zero."""
    own_tokens: int = 0
    """Prompt tokens of this frontend's requests that have ended there since the last report."""
    computed_tokens: int | None = None
    """The worker's own count at the last report; None: unknown."""
    reported_s: float = 0.0


class LocalPrefill:
    """The rule over the aggregated workers of one model."""

    def __init__(
        self,
        costs: WorkerCosts,
        backlog: PrefillBacklog,
        settings: LocalPrefillSettings | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """Follows the workers that `backlog` counts, and decides for it which queued prompts need no prefill worker."""
        self.settings = settings or LocalPrefillSettings()
        self._prompts, self._streams = costs.tables[Job.COMPUTE], costs.tables[Job.STREAM]
        self._backlog = backlog
        self._clock = clock
        self._times: dict[Start, _PromptTime] = {}
        self._workers: dict[Start, Worker] = {}
        """Those of `_times`."""
        backlog.local = self

    @property
    def max_tokens(self) -> int:
        """See `LocalPrompts`."""
        return self.settings.max_tokens

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new registry view."""
        workers = tuple(workers)
        # One that drains has no costs any more, though it still reports its load.
        known = {
            worker.start
            for worker in workers
            if worker.role is WorkerRole.AGGREGATED and worker.state is WorkerState.SERVING
        }
        self._workers = {worker.start: worker for worker in workers if worker.start in known}
        for start in self._times.keys() - known:
            del self._times[start]
        for start in known - self._times.keys():
            self._times[start] = _PromptTime(at_s=self._clock(), reported_s=self._clock())

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Record a worker's load; None: unknown. What this frontend did not make it compute, others did."""
        time, now_s = self._times.get(start), self._clock()
        if time is None:
            return
        computed = None if load is None else load.computed_tokens
        if computed is not None and time.computed_tokens is not None and now_s > time.reported_s:
            self._decay(time)
            # A request may end here and be in the next report only, so a single difference may be below zero.
            tokens, elapsed_s = computed - time.computed_tokens - time.own_tokens, now_s - time.reported_s
            share = tokens * self._per_token(start) / elapsed_s if self._prompts.has_rate else 0.0
            keep = OTHERS_KEEP**elapsed_s
            time.others_share = keep * time.others_share + (1 - keep) * share
        time.computed_tokens, time.reported_s, time.own_tokens = computed, now_s, 0

    def place(self, prompt_tokens: int, alone: Route, pair: Callable[[], Route]) -> Route:
        """The route of a request for which both kinds are equally preferred.

        Args:
            prompt_tokens: of the request.
            alone: its route over an aggregated worker.
            pair: selects its route over a pair; not called where that is not needed.
        """
        if not self._is_known(alone.decode.worker_id):
            return replace(pair(), placement=Placement.LOAD_UNKNOWN)
        uncached_tokens = prompt_tokens - (alone.expected_cached_tokens or 0)
        route: Route | None = None
        local = Placement.SHORT_PROMPT
        if uncached_tokens > self.settings.max_tokens:
            route, local = pair(), Placement.PREFILL_WAIT
            if not self._gains(alone, route, prompt_tokens):
                return replace(route, placement=Placement.LONG_PROMPT)
        if not self._has_share(alone.decode.start, uncached_tokens):
            route = route or pair()
            if not self._has_share(alone.decode.start, uncached_tokens, self._wait(route.computing.worker_id)):
                return replace(route, placement=Placement.PROMPT_SHARE)
        if self._stream_cost(alone.decode, prompt_tokens) > STREAMS_LEAD:
            route = route or pair()
            if self._streams_too_much(alone.decode, route.decode, prompt_tokens):
                return replace(route, placement=Placement.STREAMS)
        return replace(alone, placement=local)

    def may_take(self, prompt_tokens: int, reserved_tokens: float, wait_s: float) -> bool:
        """See `LocalPrompts`."""
        return any(
            self._is_known(start[0])
            and (prompt_tokens <= self.max_tokens or self._prompts.of((start[0],), prompt_tokens)[0] < wait_s)
            and self._has_share(start, prompt_tokens, wait_s, reserved_tokens)
            and self._has_place(self._workers[start], prompt_tokens)
            for start in self._backlog.aggregated
        )

    def sent(self, route: Route, prompt_tokens: int) -> Callable[[], None]:
        """Charge an aggregated worker with a prompt that is being sent to it, for whatever reason.

        Returns what to call when the request has ended there.
        """
        time = self._times.get(route.decode.start)
        if time is None or route.prefill is not None:
            return _nothing
        tokens = max(0, prompt_tokens - (route.expected_cached_tokens or 0))
        if self._prompts.has_rate:
            self._decay(time)
            time.spent_s += (tokens + PROMPT_COST_TOKENS) * self._per_token(route.decode.start)

        def ended() -> None:
            time.own_tokens += tokens

        return ended

    def _gains(self, alone: Route, pair: Route, prompt_tokens: int) -> bool:
        """Whether a prompt is computed so much earlier on the aggregated worker as it takes there.

        Where neither has any of it cached: whether it would wait longer for the prefill worker than it costs here. The
        prompt itself counts at one rate on both, so that two measurements of equal workers decide nothing.
        """
        here, there = alone.decode, pair.computing
        per_token = self._per_token(here.start)
        saved_tokens = (alone.expected_cached_tokens or 0) - (pair.expected_cached_tokens or 0)
        uncached_tokens = prompt_tokens - (alone.expected_cached_tokens or 0)
        earlier = self._wait(there.worker_id) - self._wait(here.worker_id) + saved_tokens * per_token
        return earlier > (uncached_tokens + PROMPT_COST_TOKENS) * per_token

    def _streams_too_much(self, worker: Worker, decode: Worker, prompt_tokens: int) -> bool:
        """Whether an aggregated worker has no place for another stream, or far less than the pair's decode worker."""
        return (
            not self._has_place(worker, prompt_tokens)
            or self._stream_cost(worker, prompt_tokens) > self._stream_cost(decode, prompt_tokens) + STREAMS_LEAD
        )

    def _has_place(self, worker: Worker, prompt_tokens: int) -> bool:
        """Whether a worker has a slot and memory for another stream."""
        row, capacity = self._streams.rows[worker.worker_id], worker.capabilities
        kv_tokens = row.work - row.requests * row.request_tokens
        return row.requests < capacity.running_requests_max and kv_tokens + prompt_tokens < capacity.kv_capacity_tokens

    def _has_share(self, start: Start, tokens: float, wait_s: float = 0.0, reserved_tokens: float = 0.0) -> bool:
        """Whether a worker has time left for a prompt that would wait for so long at prefill.

        One that streams nothing has: it delays no token. `reserved_tokens` may be sent to it before.
        """
        prompts, time = self._prompts.rows[start[0]], self._times.get(start)
        if time is None:
            return False
        if not self._streams.rows[start[0]].requests and not reserved_tokens:
            return True
        if not self._prompts.has_rate:
            return prompts.requests < UNMEASURED_PROMPTS_MAX and not reserved_tokens
        self._decay(time)
        # Prompts of other frontends may wait there too.
        spent_s = max(time.spent_s, self._wait(start[0]))
        cost_s = (tokens + reserved_tokens + PROMPT_COST_TOKENS) * self._per_token(start)
        share = min(1.0, self.settings.share * max(1.0, wait_s / PATIENCE_S)) - max(0.0, time.others_share)
        return spent_s + cost_s <= share * WINDOW_S

    def _decay(self, time: _PromptTime) -> None:
        now_s = self._clock()
        time.spent_s, time.at_s = time.spent_s * math.exp((time.at_s - now_s) / WINDOW_S), now_s

    def _is_known(self, worker_id: str) -> bool:
        prompts, streams = self._prompts.rows.get(worker_id), self._streams.rows.get(worker_id)
        return prompts is not None and prompts.is_known and streams is not None and streams.is_known

    def _wait(self, worker_id: str) -> float:
        """Time until a worker begins another prompt: seconds, or tokens while no rate of any worker is known."""
        row = self._prompts.rows[worker_id]
        return self._prompts.of((worker_id,), 0)[0] - row.request_tokens * self._prompts.lines()[worker_id].per_token

    def _per_token(self, start: Start) -> float:
        return self._prompts.lines()[start[0]].per_token

    def _stream_cost(self, worker: Worker, tokens: int) -> float:
        return self._streams.of((worker.worker_id,), tokens)[0]


def _nothing() -> None:
    """The request is not counted here."""
