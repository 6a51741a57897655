"""Pairs and aggregated workers on virtual time: a whole role is killed under load, and no request fails.

Each seed is one fleet with its clients, short prompts and long ones; `leg_world` has the workers.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.execution.trace_recorder import Record
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.local_prefill import MAX_TOKENS, LocalPrefill
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import PolicyName
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_costs import WorkerCosts

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.domain.placement import Placement
from tandem.domain.worker import EngineLoad, WorkerRole
from tandem.errors import TandemError
from tandem.observability.request_trace import RequestTrace
from tandem.testing.virtual_time import run_virtually
from tests.faults.support.leg_world import CAPABILITIES, World, answer, fleet, now_s

SEEDS = 25
REPORT_S = 1.0
"""Between two load reports of a worker, as in a cluster."""


@dataclass(slots=True)
class Client:
    """One request, what became of it, and where."""

    leg: leg_pb2.LegRequest
    start_s: float
    tokens: list[int] = field(default_factory=list)
    failure: TandemError | None = None
    trace: RequestTrace = field(default_factory=lambda: RequestTrace(clock=now_s))

    @property
    def is_over(self) -> bool:
        """See `request_stream.TokenSink`: no stop matches here."""
        return False

    @property
    def ends_the_legs(self) -> bool:
        """See `request_stream.TokenSink`."""
        return False

    def take(self, token_ids: Any, logprobs: object) -> None:
        """See `request_stream.TokenSink`."""
        self.tokens += token_ids

    @property
    def roles(self) -> list[WorkerRole]:
        """Of the workers that streamed, one for each attempt."""
        return [attempt.decode_worker.role for attempt in self.trace.attempts if attempt.decode_worker is not None]


class Mixed:
    """One seed: two or three prefill and decode workers, one or two aggregated ones."""

    def __init__(self, seed: int, policy: PolicyName) -> None:
        self.rng = random.Random(seed)
        draw = self.rng
        workers = fleet(draw.randint(1, 3), draw.randint(1, 3), CAPABILITIES, aggregated=draw.randint(1, 2))
        self.world = World(draw, workers)
        refusals, self.breakers = RecentRefusals(now_s), CircuitBreakers(now_s, draw, self.world.unhealthy)
        self.breakers.follow(self.world.workers)
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        self.backlog = PrefillBacklog("m", math.inf)
        self.costs = WorkerCosts(self.backlog, now_s)
        self.local = LocalPrefill(self.costs, self.backlog, clock=now_s)
        chooser = make_policy(policy, self.costs, None, draw)
        routes = Routes(
            *(model, self.world.view, self.world.unhealthy, refusals, self.breakers, draw),
            *(chooser, self.costs, self.local),
        )
        routes.follow(self.world.workers)
        self.deps = ExecutionDeps(routes, refusals, self.breakers, cast("Any", self.world), now_s, draw)
        self.clients = [self._client(number) for number in range(30)]

    def _client(self, number: int) -> Client:
        length = self.rng.choice((3, 40, MAX_TOKENS, MAX_TOKENS + 1, 900))
        stopping = sampling_pb2.Stopping(max_tokens=self.rng.randint(2, 40))
        token_ids = [11, number + 20, *(13 for _ in range(length - 2))]
        leg = leg_pb2.LegRequest(request_id=f"r{number}", model="m", token_ids=token_ids, stopping=stopping)
        return Client(leg, start_s=self.rng.uniform(0, 4))

    async def run(self, *killed: tuple[float, WorkerRole, float]) -> None:
        """Serve all clients; each of `killed` is a role, when all its workers are killed, and started again."""
        reports = asyncio.create_task(self._report())
        async with asyncio.TaskGroup() as group:
            for client in self.clients:
                group.create_task(self._serve(client))
            for at_s, role, back_s in killed:
                group.create_task(self._kill(at_s, role, back_s))
        reports.cancel()
        await asyncio.wait({reports})
        await self.world.close()

    async def _report(self) -> None:
        while True:
            for worker in self.world.workers:
                is_dead = self.world.scripted[worker.start].dead.done()
                load = None if is_dead else EngineLoad(running_requests=0, waiting_requests=0, waiting_tokens=0)
                self.costs.note(worker.start, load)
                self.local.note(worker.start, load)
            await asyncio.sleep(REPORT_S)

    async def _serve(self, client: Client) -> None:
        await asyncio.sleep(client.start_s)
        work: PrefillWork = self.backlog.reserve(len(client.leg.token_ids))
        try:
            async with self.deps.accepted(client.leg, client, None, Record(client.trace), work) as stream:
                await stream.run()
        except TandemError as problem:
            client.failure = problem

    async def _kill(self, at_s: float, role: WorkerRole, back_s: float) -> None:
        await asyncio.sleep(at_s)
        dead = [worker for worker in self.world.workers if worker.role is role]
        for worker in dead:
            self.world.scripted[worker.start].kill()
        await asyncio.sleep(back_s - at_s)
        for worker in dead:
            self.world.restart(worker)
        self.breakers.follow(self.world.workers)
        self.costs.follow(self.world.workers)
        self.deps.notice(self.world.workers)


def lived(seed: int, policy: PolicyName, *killed: tuple[float, WorkerRole, float]) -> Mixed:
    """A history in which no request failed and all tokens are exact."""

    async def live() -> Mixed:
        mixed = Mixed(seed, policy)
        await mixed.run(*killed)
        return mixed

    mixed = run_virtually(live())
    for client in mixed.clients:
        assert client.failure is None, (seed, client.leg.request_id, client.failure)
        assert client.tokens == answer(client.leg.token_ids, client.leg.stopping.max_tokens), (seed, client)
    return mixed


@pytest.mark.timeout(120)
@pytest.mark.parametrize("policy", [PolicyName.RANDOM, PolicyName.AUTO])
def test_no_request_fails_when_all_prefill_workers_are_killed(policy: PolicyName) -> None:
    met, placements = Counter[str](), Counter[Placement | None]()
    for seed in range(SEEDS):
        mixed = lived(seed, policy, (2.0, WorkerRole.PREFILL, 6.0))
        for client in mixed.clients:
            attempts = client.trace.attempts
            placements.update(attempt.placement for attempt in attempts)
            met["broken in the hand-over"] += len(attempts) > 1 and not attempts[1].tokens_before
            met["after the kill"] += attempts[0].begin_s > 2.0 and client.roles == [WorkerRole.AGGREGATED]
    assert min(met.values()) > 15, f"void: these seeds meet too little: {met}"
    assert placements[Placement.NO_PAIR] > 15
    assert placements[Placement.SHORT_PROMPT] > 15
    assert placements[Placement.LONG_PROMPT] > 15


@pytest.mark.timeout(120)
def test_streams_continue_on_the_other_kind_and_back() -> None:
    """All decode workers are killed, then, once they are back, all aggregated ones."""
    moves = Counter[tuple[WorkerRole, ...]]()
    for seed in range(SEEDS):
        kills = (1.5, WorkerRole.DECODE, 1.9), (2.0, WorkerRole.AGGREGATED, 6.0)
        for client in lived(seed, PolicyName.AUTO, *kills).clients:
            if any(attempt.tokens_before for attempt in client.trace.attempts):
                moves[tuple(dict.fromkeys(client.roles))] += 1
    assert moves[WorkerRole.DECODE, WorkerRole.AGGREGATED] > 8, moves
    assert moves[WorkerRole.AGGREGATED, WorkerRole.DECODE] > 8, moves
