"""Attempts, links, step streams and admission on virtual time, against thousands of drawn fleets, faults and clients.

Each seed is one history: clients of all kinds, workers that are killed, stopped, started again or fail hand-overs. What
is promised of every history is judged; what is promised in seconds, where one worker is at fault and others are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.execution.request_stream import ATTEMPTS_MAX, PAUSE_MAX_S, ExecutionDeps, RetryingStream
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.domain.request_state import Phase
from tandem.domain.worker import Worker
from tandem.errors import DeadlinePassed, LegFailed, Overloaded, TandemError
from tandem.testing.virtual_time import run_virtually
from tests.faults.support.fault_cluster import REPOSITORY
from tests.faults.support.leg_world import CAPABILITIES, Sent, World, answer, fleet, now_s
from tests.unit.support.admission import admission_of

SEED_VARIABLE = "TANDEM_FAULT_SEED"
SEEDS = 2_000
PARTS = 8
AFTER_A_KILL_S = 0.5
AFTER_A_STOP_S = 2.0
SETTLE_S = 6.0
"""Within it every worker runs again and has heard of every abort."""
CONTINUATIONS = {"guided", "penalties", "breaks", "weights", "workers"}


@dataclass(slots=True)
class Client:
    """One request and what became of it."""

    leg: leg_pb2.LegRequest
    start_s: float
    deadline_s: float | None = None
    leaves_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    failure: TandemError | None = None
    left: bool = False
    finish: leg_pb2.LegFinish | None = None
    stream: RetryingStream | None = None
    legs_left: int = 0
    """Legs that the frontend still listened to when its end was reported."""

    @property
    def is_over(self) -> bool:
        """See `request_stream.TokenSink`: no stop matches here."""
        return False

    @property
    def ends_the_legs(self) -> bool:
        """See `request_stream.TokenSink`."""
        return False

    def take(self, token_ids: Sequence[int], logprobs: object) -> None:
        """See `request_stream.TokenSink`."""
        self.tokens += token_ids


@dataclass(slots=True)
class Fault:
    """What was done to a worker, and when."""

    kind: str
    worker: Worker
    time_s: float


class Headroom:
    """For so many requests; the others wait in the queue."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        return held_requests < self.requests_max


class History:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.is_single = self.rng.random() < 0.5
        """Only one worker is ever at fault, and each role has others."""
        counts = (3, 3) if self.is_single else (self.rng.randint(1, 3), self.rng.randint(1, 4))
        self.world = World(self.rng, fleet(*counts, CAPABILITIES))
        refusals = RecentRefusals(now_s)
        breakers = self.breakers = CircuitBreakers(now_s, self.rng, self.world.unhealthy)
        breakers.follow(self.world.workers)
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        routes = Routes(model, self.world.view, self.world.unhealthy, refusals, breakers, self.rng)
        self.attempts = ExecutionDeps(routes, refusals, breakers, cast("Any", self.world), now_s, self.rng)
        self.admission = admission_of(self.rng.randint(4, 12), Headroom(self.rng.randint(1, 6)), now_s)
        self.clients = [self._client(number) for number in range(self.rng.randint(2, 9))]
        self.faults: list[Fault] = []
        self.open_legs = 0
        """Legs that were left with workers at the end."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for client in self.clients:
                group.create_task(self._live(client))
            group.create_task(self._break())
        # Aborts are on their way, to workers that may stand still for a while yet.
        await asyncio.sleep(SETTLE_S)
        self.open_legs = self.world.open_legs()
        await self.world.close()

    def _client(self, number: int) -> Client:
        draw = self.rng
        stopping = sampling_pb2.Stopping(max_tokens=draw.randint(1, 40))
        leg = leg_pb2.LegRequest(request_id=f"r{number}", model="m", token_ids=[11, number + 20, 13], stopping=stopping)
        if draw.random() < 0.1:
            leg.sampling.repetition_penalty = draw.choice((1.0, 1.2))
        client = Client(leg, start_s=draw.uniform(0, 2))
        if draw.random() < 0.2:
            client.deadline_s = client.start_s + draw.uniform(0.05, 4)
        if draw.random() < 0.2:
            client.leaves_s = client.start_s + draw.uniform(0, 3)
        return client

    async def _live(self, client: Client) -> None:
        await asyncio.sleep(client.start_s)
        task = asyncio.create_task(self._ask(client))
        if client.leaves_s is not None:
            await asyncio.wait({task}, timeout=client.leaves_s - now_s())
            client.left = task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _ask(self, client: Client) -> None:
        """What `Generation` does with a request that it has checked."""
        demand = QueuedRequest(
            tokens=len(client.leg.token_ids) + client.leg.stopping.max_tokens, deadline_s=client.deadline_s
        )
        try:
            with self.admission.admit():
                async with self.admission.slot(demand):
                    left_s = None if client.deadline_s is None else max(0.0, client.deadline_s - now_s())
                    async with self.attempts.accepted(client.leg, client, left_s) as client.stream:
                        await client.stream.run()
                        client.finish = client.stream.finish()
        except TandemError as problem:
            client.failure = problem
        finally:
            mine = [sent for sent in self.world.sent if sent.request_id == client.leg.request_id]
            client.legs_left = sum(leg is not None and leg.sink is not None for sent in mine for leg in sent.legs)

    async def _break(self) -> None:
        victim = self.rng.choice(self.world.workers)
        for _ in range(1 if self.is_single else self.rng.randint(0, 5)):
            await asyncio.sleep(self.rng.uniform(0, 2))
            await self._strike(victim if self.is_single else self.rng.choice(self.world.workers))

    async def _strike(self, worker: Worker) -> None:
        scripted, kind = self.world.scripted[worker.start], self.rng.choice(("kill", "kill", "stop", "failures"))
        self.faults.append(Fault(kind, worker, now_s()))
        if kind == "kill":
            scripted.kill()
            await asyncio.sleep(self.rng.uniform(0.01, 1.5))
            self.world.restart(worker)
            self.breakers.follow(self.world.workers)
            self.attempts.notice(self.world.workers)
        elif kind == "stop":
            scripted.thawed.clear()
            await asyncio.sleep(self.rng.uniform(0.1, 5))
            scripted.thawed.set()
        else:
            scripted.failures += self.rng.randint(1, 4)


def judge(history: History) -> None:
    """What is promised of every history."""
    for client in history.clients:
        right = answer(client.leg.token_ids, client.leg.stopping.max_tokens)
        endings = (client.finish is not None) + (client.failure is not None) + (client.left and client.finish is None)
        assert endings == 1, (client, "one ending")
        assert client.tokens == right[: len(client.tokens)], (client, "tokens of another sequence")
        assert client.finish is None or client.tokens == right, (client, "a finish before the end")
        assert client.legs_left == 0, (client, "legs that outlive their request")
        if client.stream is not None:
            phase = client.stream.state.phase
            assert phase is (Phase.FINISHED if client.finish is not None else Phase.ABORTED), (client, phase)
        _judge_failure(history, client)
    assert history.open_legs == 0, "legs are left with workers"
    assert history.admission.open_count == history.admission.waiting_count == 0
    assert history.admission._held_requests == history.admission._held_tokens == 0
    _judge_attempts(history)


def _judge_failure(history: History, client: Client) -> None:
    problem = client.failure
    if isinstance(problem, LegFailed) and client.tokens:
        assert problem.metadata["continuation"] in CONTINUATIONS, problem
    if history.is_single and problem is not None:
        may_fail = isinstance(problem, DeadlinePassed | Overloaded) or (
            client.tokens and problem.metadata.get("continuation") == "penalties"
        )
        assert may_fail, (client, history.faults)


def _judge_attempts(history: History) -> None:
    for client in history.clients:
        mine = [sent for sent in history.world.sent if sent.request_id == client.leg.request_id]
        for earlier, later in itertools.pairwise(mine):
            assert all(leg is None or leg.sink is None for leg in earlier.legs), "two attempts at one time"
            again = {worker.start for worker in earlier.route.workers} & {w.start for w in later.route.workers}
            # One that dies in the pause between two attempts was not what broke the earlier one.
            dead = [start for start in again if _died(history, start, later.time_s - PAUSE_MAX_S)]
            assert not dead, (client, "sent to a worker on which it broke")
            if history.is_single:
                _judge_time(history.faults[0], earlier, later)
        if history.is_single:
            assert len(mine) <= ATTEMPTS_MAX + 1, (client, "more attempts than one fault explains")


def _died(history: History, start: Any, time_s: float) -> bool:
    return any(f.kind == "kill" and f.worker.start == start and f.time_s < time_s for f in history.faults)


def _judge_time(fault: Fault, earlier: Sent, later: Sent) -> None:
    """The next attempt's dispatch, from when the fault was or from when the broken one met it."""
    bound_s = {"kill": AFTER_A_KILL_S, "stop": AFTER_A_STOP_S}.get(fault.kind)
    if bound_s is not None and fault.worker.start in {worker.start for worker in earlier.route.workers}:
        took_s = later.time_s - max(fault.time_s, earlier.time_s)
        assert took_s < bound_s, (fault, earlier.request_id, took_s)


def judged(seed: int) -> History:
    """One history that has kept every promise; the failure of another says how it is repeated."""

    async def live() -> History:
        history = History(seed)
        await history.run()
        return history

    history = run_virtually(live())
    try:
        judge(history)
    except AssertionError as wrong:
        again = (
            f"{SEED_VARIABLE}={seed} .venv/bin/python -m pytest {Path(__file__).relative_to(REPOSITORY)} -k repeated"
        )
        raise AssertionError(f"{wrong}\nTo repeat it: {again}") from wrong
    return history


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_history_keeps_what_is_promised(part: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # thousands of legs break
    met = dict.fromkeys(("kill", "stop", "failures", "again", "finished", "left", "late"), 0)
    for seed in range(part, SEEDS, PARTS):
        history = judged(seed)
        for fault in history.faults:
            met[fault.kind] += 1
        met["again"] += len(history.world.sent) - len({sent.request_id for sent in history.world.sent})
        met["finished"] += sum(client.finish is not None for client in history.clients)
        met["left"] += sum(client.left for client in history.clients)
        met["late"] += sum(isinstance(client.failure, DeadlinePassed) for client in history.clients)
    assert min(met.values()) > 5, f"void: these seeds meet too little: {met}"


@pytest.mark.skipif(SEED_VARIABLE not in os.environ, reason=f"{SEED_VARIABLE} names the history to be repeated")
def test_one_history_is_repeated() -> None:
    judged(int(os.environ[SEED_VARIABLE]))


def test_a_broken_promise_says_how_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def condemn(history: History) -> None:
        raise AssertionError("a promise")

    monkeypatch.setattr(f"{__name__}.judge", condemn)
    with pytest.raises(
        AssertionError, match=rf"a promise\nTo repeat it: {SEED_VARIABLE}=17 .*simulation.py -k repeated"
    ):
        judged(17)
