"""One replayed frontend: the real admission, capacity, prefill backlog and routes, with requests that are accounted.

Owns the walk of a request: admit, wait, route, send, and the end. What a serving frontend does between these, such as
tokenising and relaying, takes no time here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

from tandem.api.types.v1 import leg_pb2
from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.errors import TandemError
from tandem.service.loop_load import LoopLoad
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.fleet_file import DIGEST, MODEL, Frontends
from tandem_frontend.replay.job import Job
from tandem_frontend.replay.routing import KnownCaches, TracedBlocks, replayed_policy
from tandem_frontend.replay.trace import TracedRequest
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.local_prefill import LocalPrefill, LocalPrefillSettings
from tandem_frontend.routing.policy import RoutingRequest
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_costs import WorkerCosts

NO_STARTS: frozenset[Start] = frozenset()
FINISHED = "finished"
SERVED_MODEL = cast("ServedModel", SimpleNamespace(name=MODEL, tokenizer=SimpleNamespace(digest=DIGEST)))
"""All that routing reads of a model. No tokenizer is needed: a trace has no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of one request. Times in virtual seconds."""

    number: int
    frontend: int
    outcome: str
    """`FINISHED`, or the reason of the error that ended it."""
    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    """Generated ones."""
    queue_s: float = 0.0
    """Wait in the frontend's queue."""
    memory_s: float = 0.0
    """Then the wait for the decode engine's memory; 0 on an aggregated worker."""
    prefill_wait_s: float = 0.0
    """Then the wait in the engine that computes the prompt."""
    prompt_s: float = 0.0
    """Then the computation of the prompt."""
    handover_s: float = 0.0
    """Then the rest of the transfer, and the wait for a place among the requests that generate."""
    ttft_s: float = 0.0
    itl_s: float = 0.0
    """Mean time between two tokens; 0 for a single one."""
    end_s: float = 0.0
    cached_tokens: int = 0
    expected_cached_tokens: int | None = None
    """What the policy expected; None: it did not know."""
    prefill: str = ""
    """Worker that computed the prompt."""
    decode: str = ""
    """Worker that generated."""
    placement: str = ""
    """Why a pair, or an aggregated worker; empty: there was nothing to decide."""


class ReplayedFrontend:
    """One frontend of a fleet, on the running loop's time."""

    def __init__(
        self,
        number: int,
        settings: Frontends,
        workers: tuple[Worker, ...],
        engines: Mapping[Start, AccountedEngine],
        policy: str,
        rng: random.Random,
    ) -> None:
        """`number` counts the frontends from 0."""
        self.number = number
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        clock = self._loop.time
        self._capacity, self._backlog = Capacity(MODEL), PrefillBacklog(MODEL, settings.prefill_queue_s)
        # This process computes in no time: only the loop's own lag would count, which is none.
        requests = OpenRequests(settings.open_requests_max, clock, LoopLoad(lambda: 0.0))
        self._admission = Admission(requests, self._capacity, clock, self._backlog, settings.prefill_queue_s)
        self._costs = WorkerCosts(self._backlog, clock)
        self.caches = KnownCaches(workers)
        refusals, breakers = RecentRefusals(clock), CircuitBreakers(clock, rng)
        chosen_by = replayed_policy(policy, self._costs, self.caches, engines, rng)
        self._local: LocalPrefill | None = None
        if settings.local_prefill:
            rule = LocalPrefillSettings(settings.local_prefill_max_tokens, settings.local_prefill_share)
            self._local = LocalPrefill(self._costs, self._backlog, rule, clock)
        self._workers: tuple[Worker, ...] = ()
        self._routes = Routes(
            SERVED_MODEL, lambda: self._workers, lambda: NO_STARTS, refusals, breakers, rng, chosen_by, self._costs,
            self._local,
        )  # fmt: skip
        self._breakers = breakers
        self.open_count = self.ended_count = self.waiting_count = 0
        self.follow(workers)

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """A new view of the registry."""
        self._workers = workers
        for follower in (self._breakers, self._capacity, self._routes):
            follower.follow(workers)
        self._admission.reevaluate_soon()

    def note_load(self, start: Start, load: EngineLoad) -> None:
        """A worker's load report."""
        for follower in (self._capacity, self._costs):
            follower.note(start, load)
        if self._local is not None:
            self._local.note(start, load)
        self._admission.reevaluate_soon()

    async def serve(self, request: TracedRequest, hashes: tuple[int, ...]) -> Served:
        """One request, from its arrival to its end."""
        self.open_count += 1
        self.waiting_count += 1
        served = await self._serve(request, hashes)
        self.open_count -= 1
        self.ended_count += 1
        return served

    async def _serve(self, request: TracedRequest, hashes: tuple[int, ...]) -> Served:
        arrival_s = self._loop.time()
        queued = QueuedRequest(
            tokens=request.prompt_tokens + request.answer_tokens,
            answer_tokens=request.answer_tokens,
            prompt_tokens=request.prompt_tokens,
        )
        is_waiting = True
        try:
            with self._admission.admit():
                async with self._admission.slot(queued) as work:
                    self.waiting_count -= 1
                    is_waiting = False
                    queue_s = self._loop.time() - arrival_s
                    job = Job(request.prompt_tokens, request.answer_tokens, hashes)
                    route = self._route(job)
                    await self._run(job, route, work)
        except TandemError as problem:
            self.waiting_count -= is_waiting
            return Served(
                number=request.number,
                frontend=self.number,
                outcome=problem.reason,
                arrival_s=arrival_s,
                prompt_tokens=request.prompt_tokens,
                answer_tokens=0,
                end_s=self._loop.time(),
            )
        return self._served(request, arrival_s, queue_s, job, route)

    def _route(self, job: Job) -> Route:
        blocks = TracedBlocks(job.prompt_tokens, job.hashes)
        route = self._routes.first(RoutingRequest(job.prompt_tokens, blocks))
        # As an engine does: the answer ends where the memory of the worker that streams does.
        context_tokens = route.decode.capabilities.context_tokens_max
        job.answer_tokens = min(job.answer_tokens, context_tokens - job.prompt_tokens)
        return route

    async def _run(self, job: Job, route: Route, work: PrefillWork) -> None:
        ended = self._loop.create_future()
        stream = self._engines[route.decode.start]

        def prefilled(job: Job) -> None:
            finish = leg_pb2.LegFinish()
            finish.usage.cached_tokens = job.cached_tokens
            finish.timings.prefill_start_time.FromNanoseconds(round(job.prefill_start_s * 1e9))
            finish.timings.prefill_end_time.FromNanoseconds(round(job.prefill_end_s * 1e9))
            work.computed(finish)

        job.prefilled = prefilled
        job.ended = lambda job: ended.set_result(None)
        job.expected_tokens = job.prompt_tokens - (route.expected_cached_tokens or 0)
        work.sent(route.computing.start, route.expected_cached_tokens or 0)
        sent = self._routes.sent(route, job.prompt_tokens)
        self._engines[route.computing.start].begin(job, None if route.prefill is None else stream)
        await ended
        sent.end()

    def _served(self, request: TracedRequest, arrival_s: float, queue_s: float, job: Job, route: Route) -> Served:
        return Served(
            number=request.number,
            frontend=self.number,
            outcome=FINISHED,
            arrival_s=arrival_s,
            prompt_tokens=job.prompt_tokens,
            answer_tokens=job.answer_tokens,
            queue_s=queue_s,
            memory_s=job.submitted_s - job.sent_s,
            prefill_wait_s=job.prefill_start_s - job.submitted_s,
            prompt_s=job.prefill_end_s - job.prefill_start_s,
            handover_s=job.first_token_s - job.prefill_end_s,
            ttft_s=job.first_token_s - arrival_s,
            itl_s=(job.end_s - job.first_token_s) / (job.answer_tokens - 1) if job.answer_tokens > 1 else 0.0,
            end_s=job.end_s,
            cached_tokens=job.cached_tokens,
            expected_cached_tokens=route.expected_cached_tokens,
            prefill=route.computing.worker_id,
            decode=route.decode.worker_id,
            placement="" if route.placement is None else route.placement.value,
        )
