"""`tandem plan --apply`: the role changes that a plan needs, their preview, and one after the other.

Owns the steps and what is said of them. Changes roles only: it starts and stops no worker. `role` makes each change.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tandem.cli.membership import registry_addresses
from tandem.cli.role import role as change_one
from tandem.client.role_calls import roles_of
from tandem.domain.recorded_load import RecordedCluster
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import ConfigError, StartError, TandemError
from tandem.rpc.channels import Channels
from tandem.tls.paths import Tls


@dataclass(frozen=True, slots=True)
class Step:
    """One worker takes another role."""

    worker: Worker
    role: WorkerRole

    def __str__(self) -> str:
        return f"{self.worker.worker_id}: {self.worker.role.value} -> {self.role.value}"


def role_steps(
    workers: Sequence[Worker], wanted: Mapping[WorkerRole, int], takes: Mapping[str, Collection[WorkerRole]]
) -> list[Step]:
    """The changes after which every role has at least the planned number of workers.

    Args:
        workers: those that serve.
        wanted: the planned number of each role.
        takes: by worker id, the roles that it may take.

    Raises:
        StartError: names what the fleet lacks; nothing is to be changed then.
    """
    total = sum(wanted.values())
    if total > len(workers):
        need = " + ".join(f"{count} {role.value}" for role, count in wanted.items() if count)
        raise StartError(
            f"the plan needs {total} workers ({need}), and {len(workers)} serve: roles alone do not do it. "
            f"Start {total - len(workers)} more first, such as by the counts of `tandem up`"
        )
    left = {role: [one for one in workers if one.role is role] for role in WorkerRole}
    steps: list[Step] = []
    for role in WorkerRole:
        for _ in range(wanted.get(role, 0) - len(left[role])):
            step = Step(_spare(left, role, wanted, takes), role)
            left[step.worker.role].remove(step.worker)
            steps.append(step)
    return steps


def _spare(
    left: Mapping[WorkerRole, Sequence[Worker]],
    role: WorkerRole,
    wanted: Mapping[WorkerRole, int],
    takes: Mapping[str, Collection[WorkerRole]],
) -> Worker:
    """A worker that its role can spare: the plan does not need it there, and another one of the role stays."""
    spare = [one for own, some in left.items() if len(some) > max(1, wanted.get(own, 0)) for one in reversed(some)]
    able = [one for one in spare if role in takes.get(one.worker_id, ())]
    if able:
        return able[0]
    if spare:
        names = ", ".join(one.worker_id for one in spare)
        raise StartError(f"one more {role.value} worker is planned, and none of {names} may take that role")
    raise StartError(
        f"one more {role.value} worker is planned, and the last worker of a role keeps it: plan with another --shape, "
        "or use `tandem role --force`"
    )


async def apply_plan(
    wanted: Mapping[WorkerRole, int],
    cluster: RecordedCluster,
    registry: str,
    tls: Tls | None,
    *,
    is_agreed: bool,
) -> int:
    """Show the changes, ask, and make them, one after the other. Returns the exit status.

    Raises:
        ConfigError: there is no terminal to ask on, and `is_agreed` is false.
        StartError: the plan cannot be reached by changes of roles; nothing has changed.
        TandemError: no worker can be asked for its roles; nothing has changed.
    """
    channels = Channels(tls)
    try:
        found = await asyncio.gather(*(roles_of(channels, one.address) for one in cluster.workers))
    finally:
        await channels.close()
    takes = {one.worker_id: roles for one, roles in zip(cluster.workers, found, strict=True)}
    steps = role_steps(cluster.workers, wanted, takes)
    surplus = len(cluster.workers) - sum(wanted.values())
    if surplus:
        print(
            f"{surplus} of {len(cluster.workers)} workers more than planned keep serving (`tandem drain` removes one)"
        )
    if not steps:
        print("every role has the planned workers: nothing to change")
        return 0
    print("changes, one after the other:")
    for step in steps:
        print(f"  {step}")
    if not is_agreed and not _is_agreed():
        print("nothing was changed")
        return 1
    return await _make(steps, await registry_addresses(registry), tls)


async def _make(steps: Sequence[Step], registries: Sequence[str], tls: Tls | None) -> int:
    """Make the changes up to the first one that fails. Returns the exit status."""
    for number, step in enumerate(steps):
        try:
            await change_one(step.worker.worker_id, step.role, registries, tls=tls)
        except TandemError as problem:
            done = ", ".join(map(str, steps[:number])) or "none"
            print(
                f"stopped at {step}: {problem}\nmade before: {done}; not tried: {len(steps) - number - 1}", flush=True
            )
            return 1
    print("the roles are as planned; a restarted worker has the role of its settings again")
    return 0


def _is_agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("yes", "is required without a terminal to ask on")
    return input("Change these roles? [y/N] ").strip().lower() in ("y", "yes")
