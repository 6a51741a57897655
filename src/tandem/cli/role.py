"""`tandem role`: changes the role of a worker, through a registry, and prints the progress."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from tandem.api.types.v1 import role_change_pb2 as pb
from tandem.cli.membership import Membership, ask_all
from tandem.client.role_calls import change_role
from tandem.domain.worker import WorkerRole
from tandem.errors import ConfigError, ServiceError, StartError
from tandem.rpc.convert import ROLE_BY_NUMBER
from tandem.tls.paths import Tls


def parse_role(text: str) -> WorkerRole:
    """A role as typed.

    Raises:
        ConfigError: there is no such role.
    """
    try:
        return WorkerRole(text)
    except ValueError:
        raise ConfigError("ROLE", f"must be {', '.join(r.value for r in WorkerRole)}, not {text!r}") from None


async def role(
    worker_id: str,
    wanted: WorkerRole,
    registries: Sequence[str],
    *,
    force: bool = False,
    drain_timeout_s: float | None = None,
    tls: Tls | None = None,
) -> int:
    """Change the role of a worker, and wait until it serves in it. Returns the exit status.

    Raises:
        StartError: no worker has that id, or no registry has a live view.
        RoleChangeRefused: nothing has changed.
        TandemError: no registry, or not the worker, can be reached; or the change failed.
    """
    members = await ask_all(registries, tls)
    epoch = _epoch_of(worker_id, members)
    registry = next((response.address for response in members.responses if response.is_live), None)
    if registry is None:
        raise StartError("no registry has a live view: a role is changed only on one")
    steps = change_role(registry, worker_id, wanted, epoch=epoch, force=force, drain_timeout_s=drain_timeout_s, tls=tls)
    async with aclosing(steps) as progress:
        async for step in progress:
            print(f"{worker_id}: {_text(step)}", flush=True)
            if step.stage == pb.ROLE_CHANGE_STAGE_DONE:
                return 0
    raise ServiceError(f"the registry at {registry} closed the call before the change was done; see `tandem status`")


def _epoch_of(worker_id: str, members: Membership) -> int:
    workers = {entry.worker.worker_id: entry.worker for entry in members.workers}
    if worker_id not in workers:
        known = ", ".join(sorted(workers)) or "none"
        raise StartError(f"no worker {worker_id} is registered (registered: {known})")
    return workers[worker_id].epoch


def _text(step: pb.RoleChange) -> str:
    if step.stage == pb.ROLE_CHANGE_STAGE_DRAINING:
        return f"draining, {step.open_legs} open legs"
    if step.stage == pb.ROLE_CHANGE_STAGE_SWITCHING:
        return "switching"
    if step.stage == pb.ROLE_CHANGE_STAGE_REGISTERING:
        return "registering"
    if step.stage != pb.ROLE_CHANGE_STAGE_DONE:
        return "an unknown stage: the worker may run another release"
    how = "in place" if step.in_place else "with an engine started anew"
    name, seconds = ROLE_BY_NUMBER[step.worker.role].value, step.switch_time.ToNanoseconds() / 1e9
    return f"has role {name}, epoch {step.worker.epoch}, {how}, in {seconds:.2f} s"
