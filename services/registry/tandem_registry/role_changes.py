"""Role changes on behalf of callers: which ones the fleet can bear, and passing them on to the worker.

Owns the rule that a role keeps a serving worker, on a live view only. The worker knows whether it can take the role,
and does all the rest (`tandem.worker.role_change`). Holds nothing that must survive: a change that was passed on goes
on without this process.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.types.v1 import role_change_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.client.role_calls import change_at_worker
from tandem.clock import Clock, monotonic
from tandem.domain.worker import Start, Worker, WorkerRole, WorkerState
from tandem.errors import InvalidRequest, RoleChangeRefused, StaleEpoch, TandemError, WorkerNotFound
from tandem.rpc.channels import Channels
from tandem.rpc.convert import ROLE_BY_NUMBER
from tandem_registry.backends.port import Backend
from tandem_registry.validation import checked_epoch, checked_worker_id
from tandem_registry.view import Health, View

UNCONFIRMED_S = 10.0
"""For so long a worker counts as leaving where the caller left before its first step: it may have begun, and then the
view shows it."""


class RoleChanges:
    """The role changes that this registry passes on."""

    def __init__(self, backend: Backend, channels: Channels, clock: Clock = monotonic) -> None:
        self._backend = backend
        self._channels = channels
        self._clock = clock
        self._leaving: dict[Start, float] = {}
        """Starts whose change was passed on, and until when they count: they leave their role, also while the view does
        not show it yet."""

    async def change(self, request: pb.ChangeRoleRequest) -> AsyncGenerator[role_change_pb2.RoleChange, None]:
        """Check a change, have the worker make it, and yield its progress.

        Raises:
            InvalidRequest: a field is wrong.
            WorkerNotFound: no such worker is registered.
            StaleEpoch: another start of it is.
            RoleChangeRefused: the view is not live, or no worker of its role would be left; or the worker refuses.
            TandemError: the worker cannot be reached, or the change failed.
        """
        worker_id, role = checked_worker_id("worker_id", request.worker_id), _checked_role(request)
        if request.HasField("epoch"):
            checked_epoch("epoch", request.epoch)
        await self._check_leader(request, worker_id)
        worker = self._admitted(await self._backend.view(), worker_id, role, request)
        forwarded = worker_pb.ChangeRoleRequest(worker_epoch=worker.epoch, role=request.role)
        if request.HasField("drain_timeout"):
            forwarded.drain_timeout.CopyFrom(request.drain_timeout)
        is_first = worker.start not in self._leaving
        self._leaving[worker.start] = math.inf
        has_begun = False
        try:
            async with aclosing(change_at_worker(self._channels, worker.address, forwarded)) as steps:
                async for step in steps:
                    has_begun = True
                    yield step
        except BaseException as problem:
            # Not where an earlier call has begun its change.
            if is_first and not has_begun:
                if isinstance(problem, TandemError):
                    self._leaving.pop(worker.start, None)
                else:
                    # The caller has left: the worker may refuse, or go on.
                    self._leaving[worker.start] = self._clock() + UNCONFIRMED_S
            raise

    async def _check_leader(self, request: pb.ChangeRoleRequest, worker_id: str) -> None:
        """Refuse a leader whose term has ended: another one may be changing roles."""
        if not request.HasField("election"):
            return
        leader = await self._backend.leader(checked_worker_id("election", request.election))
        if leader is None or leader.term != request.leader_term:
            now = "it has no leader" if leader is None else f"it has term {leader.term}"
            raise RoleChangeRefused(
                f"the leader of term {request.leader_term} of {request.election} leads no more: {now}", worker=worker_id
            )

    def _admitted(self, view: View, worker_id: str, role: WorkerRole, request: pb.ChangeRoleRequest) -> Worker:
        """The worker, which may leave its role."""
        now_s, listed_starts = self._clock(), {listed.member.start for listed in view.workers}
        self._leaving = {one: end_s for one, end_s in self._leaving.items() if one in listed_starts and now_s < end_s}
        worker = next((listed.member for listed in view.workers if listed.member.worker_id == worker_id), None)
        if worker is None:
            raise WorkerNotFound(f"no live worker has the id {worker_id!r}", worker=worker_id)
        if request.HasField("epoch") and request.epoch != worker.epoch:
            raise StaleEpoch(
                f"worker {worker_id} has restarted: its epoch is {worker.epoch}, not {request.epoch}",
                worker=worker_id,
                expected=request.epoch,
                actual=worker.epoch,
            )
        if not self._backend.origin.is_live:
            raise _refused(worker, role, "this registry has only the last known view; some workers in it may be gone")
        if role is not worker.role and not request.force and not self._has_another(view, worker):
            what = f"no other {worker.role.value} worker of model {worker.capabilities.model} is serving"
            raise _refused(worker, role, f"{what}; force changes it all the same")
        return worker

    def _has_another(self, view: View, worker: Worker) -> bool:
        """Whether another worker of the same role and model serves, and stays."""
        return any(
            other.role is worker.role
            and other.capabilities.model == worker.capabilities.model
            and other.worker_id != worker.worker_id
            and other.state is WorkerState.SERVING
            and listed.health is not Health.CRITICAL
            and other.start not in self._leaving
            for listed in view.workers
            for other in (listed.member,)
        )


def _checked_role(request: pb.ChangeRoleRequest) -> WorkerRole:
    role = ROLE_BY_NUMBER.get(request.role)
    if role is None:
        raise InvalidRequest("role", "must be PREFILL, DECODE or AGGREGATED")
    return role


def _refused(worker: Worker, role: WorkerRole, why: str) -> RoleChangeRefused:
    return RoleChangeRefused(
        f"worker {worker.worker_id} keeps its role {worker.role.value} and does not take {role.value}: {why}",
        worker=worker.worker_id,
        role=role.value,
    )
