"""Changes the role of a running worker: at most one change at a time, at the same address, in a new epoch.

    check -> DRAINING -> settle -> close admission -> open legs end, or are cut -> step streams close
    -> the engine takes the role -> canary -> new epoch -> register -> SERVING

Owns this order, the checks before it (a refused change has changed nothing), and the way back to the former role when
no engine starts in the new one. `tandem.engine.role_engine` owns how the engine takes a role; which changes are good
for the fleet is the registry's business. What ends or waits here does so as in a drain: a leg that is cut continues on
another worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.discovery import Registration
from tandem.domain.worker import Worker, WorkerRole, WorkerState
from tandem.engine.role_engine import RoleEngine
from tandem.errors import Draining, EngineFailed, RoleChangeRefused, TandemError
from tandem.observability.metrics import Metrics
from tandem.worker.adapters import Adapters
from tandem.worker.engine_health import EngineHealth, pass_canary
from tandem.worker.identity import Identity
from tandem.worker.legs import Legs
from tandem.worker.role_progress import RoleProgress, Stage, Step
from tandem.worker.server_health import ServerHealth
from tandem.worker.steps import StepStreams

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a worker that a change goes through, and the settings it needs."""

    engine: RoleEngine
    adapters: Adapters
    registration: Registration
    identity: Identity
    legs: Legs
    streams: StepStreams
    server_health: ServerHealth
    engine_health: EngineHealth
    metrics: Metrics
    describe: Callable[[WorkerRole], Worker]
    """The worker in a role, as its engine is now; the epoch does not count."""
    roles: Collection[WorkerRole]
    """Roles that the worker may take."""
    drain_settle_s: float
    drain_timeout_s: float
    canary_timeout_s: float


class RoleChanges:
    """The role changes of one worker."""

    def __init__(
        self, parts: Parts, on_changed: Callable[[bool], None] = lambda in_place: None, clock: Clock = monotonic
    ) -> None:
        """`on_changed` is called when the engine has its new role, with whether it is still the same engine."""
        self._parts = parts
        self._on_changed = on_changed
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._wanted: WorkerRole | None = None
        self._is_leaving = False
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def roles(self) -> list[WorkerRole]:
        """The present role and those that `begin` accepts, in the order of the enumeration."""
        present = self._parts.identity.current().role
        return [role for role in WorkerRole if role is present or self._obstacle(role) is None]

    def begin(self, role: WorkerRole, drain_timeout_s: float | None = None) -> RoleProgress:
        """Start a change, which goes on by itself.

        Args:
            role: the new role.
            drain_timeout_s: time for open legs to end; then they are cut. None: the worker's setting.

        Raises:
            Draining: the worker is leaving.
            RoleChangeRefused: the worker has the role, cannot take it, is changing its role, or is not registered.
        """
        worker = self._parts.identity.current()
        if self._is_leaving:
            raise Draining(f"worker {worker.worker_id} is leaving and changes no role", worker=worker.worker_id)
        if self._task is not None and not self._task.done():
            assert self._wanted is not None
            raise refused(worker, role, f"it is changing to role {self._wanted.value} now")
        obstacle = "it has that role" if role is worker.role else self._obstacle(role)
        if obstacle is None and not self._parts.registration.registered:
            obstacle = "no registry has confirmed its lease, so its new role would not be found"
        if obstacle is not None:
            raise refused(worker, role, obstacle)
        progress = RoleProgress()
        timeout_s = self._parts.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        self._wanted = role
        self._task = asyncio.create_task(self._run(progress, role, timeout_s), name="role-change")
        return progress

    async def stop(self) -> None:
        """Cancel a change under way, and refuse later ones: the worker is leaving. May be called twice."""
        self._is_leaving = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def wait_failed(self) -> str:
        """Return why the worker cannot go on: neither the new nor the former role has an engine."""
        return await asyncio.shield(self._failed)

    def _obstacle(self, role: WorkerRole) -> str | None:
        """Why the worker can never take a role with its settings; None: it can."""
        if role not in self._parts.roles:
            return f"its setting roles allows only {', '.join(allowed.value for allowed in self._parts.roles)}"
        return self._parts.engine.problem_of(role)

    async def _run(self, progress: RoleProgress, role: WorkerRole, timeout_s: float) -> None:
        begin_s, former = self._clock(), self._parts.identity.current().role
        outcome = "failed"
        try:
            await self._drain(progress, role, timeout_s)
            outcome = await self._switch(progress, role, former)
        except asyncio.CancelledError:
            progress.fail(Draining("the worker is leaving: its role change was given up"))
            raise
        except TandemError as problem:
            log.error("the change from role %s to %s failed: %s", former.value, role.value, problem)
            progress.fail(problem)
        except Exception as problem:  # a worker that is neither in one role nor in the other must not go on
            log.exception("the change from role %s to %s failed", former.value, role.value)
            progress.fail(EngineFailed(f"internal error in the role change: {type(problem).__name__}"))
            self._give_up(f"the change to role {role.value} failed: {problem!r}")
        finally:
            attributes = {"tandem.role": role.value, "tandem.outcome": outcome}
            self._parts.metrics.record("tandem.role.change.duration", self._clock() - begin_s, attributes)

    async def _drain(self, progress: RoleProgress, role: WorkerRole, timeout_s: float) -> None:
        """Have frontends choose other workers, and end what is open here."""
        parts, legs = self._parts, self._parts.legs
        if not await parts.registration.set_state(WorkerState.DRAINING):
            await parts.registration.set_state(WorkerState.SERVING, timeout_s=0.0)
            raise refused(parts.identity.current(), role, "no registry has confirmed that it is draining")
        log.info("changing to role %s: draining %d open legs", role.value, legs.open_count)
        await parts.server_health.leave()
        progress.report(Step(stage=Stage.DRAINING, open_legs=legs.open_count))
        await asyncio.sleep(parts.drain_settle_s)
        legs.close_admission()
        try:
            async with asyncio.timeout(timeout_s):
                while legs.open_count:
                    progress.report(Step(stage=Stage.DRAINING, open_legs=legs.open_count))
                    await legs.wait_changed()
        except TimeoutError:
            log.warning(
                "%d legs are open %g s after the role change began: they end here, and their streams continue on "
                "other workers", legs.open_count, timeout_s,
            )  # fmt: skip
        # Also those without legs: they belong to the former epoch.
        parts.streams.close_all()

    async def _switch(self, progress: RoleProgress, role: WorkerRole, former: WorkerRole) -> str:
        """Have the engine take the role, and serve again. Returns the outcome for the metrics."""
        parts, begin_s = self._parts, self._clock()
        progress.report(Step(stage=Stage.SWITCHING))
        problem: TandemError | None = None
        in_place = False
        with parts.engine_health.paused():
            try:
                in_place = await self._take(role)
            except RoleChangeRefused as refusal:
                # The engine goes on in the former role.
                problem, in_place = refusal, True
            except TandemError as failure:
                problem = failure
                await self._take_back(former, failure)
        self._on_changed(in_place)
        loaded = parts.engine.adapters()
        parts.adapters.forget_all_but(loaded)
        worker = parts.identity.become(parts.describe(former if problem else role), loaded)
        parts.legs.open_admission()
        progress.report(Step(stage=Stage.REGISTERING))
        await parts.registration.wait_registered()
        await parts.engine_health.note_proof()
        await parts.server_health.rejoin()
        if problem is not None:
            raise EngineFailed(
                f"worker {worker.worker_id} has its role {former.value} again, in epoch {worker.epoch}: no engine "
                f"started in role {role.value}: {problem}", worker=worker.worker_id,
            )  # fmt: skip
        switch_s = self._clock() - begin_s
        how = "in place" if in_place else "with an engine started anew"
        log.info(
            "role %s instead of %s, %s, in %.3f s: epoch %d", role.value, former.value, how, switch_s, worker.epoch
        )
        progress.report(Step(stage=Stage.DONE, worker=worker, in_place=in_place, switch_s=switch_s))
        return "in_place" if in_place else "restarted"

    async def _take(self, role: WorkerRole, *, may_switch: bool = True) -> bool:
        in_place = await self._parts.engine.change_role(role, may_switch=may_switch)
        await pass_canary(self._parts.engine, self._parts.canary_timeout_s)
        return in_place

    async def _take_back(self, former: WorkerRole, failure: TandemError) -> None:
        """Start an engine in the former role; without one the worker cannot go on. Without an adapter it can."""
        log.error("%s; starting an engine in the former role %s", failure, former.value)
        try:
            await self._take(former, may_switch=False)
        except TandemError as problem:
            self._give_up(f"after a failed role change no engine starts in the former role {former.value}: {problem}")
            raise EngineFailed(f"the worker exits: {problem}") from None

    def _give_up(self, sentence: str) -> None:
        if not self._failed.done():
            self._failed.set_result(sentence)


def refused(worker: Worker, role: WorkerRole, why: str) -> RoleChangeRefused:
    """The error of a change that is refused."""
    return RoleChangeRefused(
        f"worker {worker.worker_id} cannot change from role {worker.role.value} to {role.value}: {why}",
        worker=worker.worker_id,
        role=role.value,
    )
