"""Roles that change during a replay: the drain, the switch and the next start of a worker, and who asks for it.

Owns the mechanics, as a worker's role change has them, and two that steer: the controller's own rule, and a schedule
that knows the load in advance. No leg is cut here: a drain lasts until the last answer has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tandem.controller.figures import LoadSampler, Observation, SeenWorker, Traffic
from tandem.controller.rule import Decision, RoleRule, RuleSettings
from tandem.domain.worker import Start, Worker, WorkerRole, WorkerState
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.fleet_file import FleetFile
from tandem_frontend.replay.frontend import ReplayedFrontend

POLL_S = 0.05
SWITCH_S = 0.5
"""In place, canary and registration included; measured on SGLang: 0.3 to 0.9 s."""
ROLES = frozenset({WorkerRole.PREFILL, WorkerRole.DECODE})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChange:
    """One change that was made. Times in virtual seconds."""

    worker_id: str
    role: WorkerRole
    begin_s: float
    """When it was asked for."""
    end_s: float
    """When the worker served in the role."""
    words: str


class ReplayedRoles:
    """The workers of a replayed fleet, and the change of their roles."""

    def __init__(
        self,
        fleet: FleetFile,
        workers: Sequence[Worker],
        engines: MutableMapping[Start, AccountedEngine],
        frontends: Sequence[ReplayedFrontend],
        add: Callable[[Worker], None],
    ) -> None:
        """`add` starts the engine of a new start."""
        self._fleet = fleet
        self._workers = list(workers)
        self.engines = engines
        self.frontends = frontends
        self._add = add
        self._loop = asyncio.get_running_loop()
        self.done: list[RoleChange] = []

    @property
    def workers(self) -> Sequence[Worker]:
        """As the registry lists them now."""
        return self._workers

    def now_s(self) -> float:
        """Virtual seconds since the begin of the replay."""
        return self._loop.time()

    async def change(self, start: Start, role: WorkerRole, words: str, switch_s: float = SWITCH_S) -> None:
        """Drain a worker, and have it serve in another role."""
        begin_s = self.now_s()
        worker = next(one for one in self._workers if one.start == start)
        self._list(worker, replace(worker, state=WorkerState.DRAINING))
        engine = self.engines[start]
        # Polled: an engine that reported its end would need a second path through its steps.
        while not engine.is_idle:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        engine.has_left = True
        await asyncio.sleep(switch_s)
        taken = self._fleet.in_role(worker, role)
        self._add(taken)
        self._list(worker, taken)
        self.done.append(
            RoleChange(worker_id=worker.worker_id, role=role, begin_s=begin_s, end_s=self.now_s(), words=words)
        )

    def _list(self, worker: Worker, instead: Worker) -> None:
        self._workers = [instead if one.worker_id == worker.worker_id else one for one in self._workers]
        for frontend in self.frontends:
            frontend.follow(tuple(self._workers))


class Steering(Protocol):
    """Decides on the roles of a replayed fleet while it serves."""

    async def run(self, roles: ReplayedRoles) -> None:
        """Steer until cancelled."""
        ...


class ControllerSteering:
    """The controller: its rule on what load reports and frontends say, one decision for each interval."""

    def __init__(self, settings: RuleSettings, interval_s: float = 1.0) -> None:
        self._rule = RoleRule(settings)
        self._interval_s = interval_s
        self._sampler = LoadSampler()
        self.decisions: list[tuple[float, Decision]] = []

    async def run(self, roles: ReplayedRoles) -> None:
        """See `Steering`."""
        sampling = asyncio.create_task(self._sample(roles))
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                decision = self._rule.decide(self._observed(roles))
                self.decisions.append((roles.now_s(), decision))
                if decision.start is not None and decision.role is not None:
                    await roles.change(decision.start, decision.role, decision.words)
        finally:
            sampling.cancel()

    async def _sample(self, roles: ReplayedRoles) -> None:
        """Load reports come to the controller as often as to a frontend."""
        while True:
            starts = {worker.start for worker in roles.workers}
            for start in starts & roles.engines.keys():
                engine = roles.engines[start]
                self._sampler.note(start, engine.load(), engine.batch.emitted_tokens, roles.now_s())
            self._sampler.keep(starts)
            await asyncio.sleep(0.25)

    def _observed(self, roles: ReplayedRoles) -> Observation:
        frontends = roles.frontends
        return Observation(
            at_s=roles.now_s(),
            is_live=True,
            workers=tuple(
                SeenWorker(
                    worker=worker,
                    load=roles.engines[worker.start].load(),
                    counts=self._sampler.of(worker.start),
                    roles=ROLES,
                )
                for worker in roles.workers
            ),
            traffic=Traffic(
                open_requests=sum(one.open_count for one in frontends),
                waiting_requests=sum(one.waiting_count for one in frontends),
                ended_requests=sum(one.ended_count for one in frontends),
            ),
        )


class ScheduledSteering:
    """Numbers of prefill workers at given times: a plan that knows the load in advance."""

    def __init__(self, schedule: Sequence[tuple[float, int]]) -> None:
        """`schedule`: (virtual seconds, prefill workers from then on), in order."""
        self._schedule = schedule

    async def run(self, roles: ReplayedRoles) -> None:
        """See `Steering`: all workers of one step of the schedule change together."""
        for at_s, count in self._schedule:
            await asyncio.sleep(max(0.0, at_s - roles.now_s()))
            prefill = [one for one in roles.workers if one.role is WorkerRole.PREFILL]
            decode = [one for one in roles.workers if one.role is WorkerRole.DECODE]
            more = count - len(prefill)
            role, giving = (WorkerRole.PREFILL, decode) if more > 0 else (WorkerRole.DECODE, prefill)
            await asyncio.gather(*(roles.change(one.start, role, "as scheduled") for one in giving[: abs(more)]))
