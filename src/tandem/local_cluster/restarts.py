"""Supervises the processes of a local cluster: reports an exit in one line, waits, restarts the process.

Owns the decision that the cluster can no longer serve; `restart_budget.py` limits the restarts. Until then the cluster
keeps running with the remaining processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.clock import Clock, monotonic
from tandem.errors import StartError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.service.restart_budget import RestartBudget, RestartPolicy


class Restarts:
    """Restarts the processes of a started cluster when they exit."""

    def __init__(
        self,
        cluster: LocalCluster,
        report: Callable[[str], None],
        policy: RestartPolicy | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`report` gets one line for each event."""
        self._cluster = cluster
        self._report = report
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._given_up: set[ClusterProcess] = set()
        self._hopeless = asyncio.Event()

    async def run(self) -> None:
        """Return when the cluster can no longer serve. Cancel it before the cluster is stopped."""
        hopeless = asyncio.create_task(self._hopeless.wait())
        tasks = {hopeless, *(asyncio.create_task(self._keep(process)) for process in self._cluster.processes)}
        waiting = tasks
        try:
            while not hopeless.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _keep(self, process: ClusterProcess) -> bool:
        """Restart it as often as the policy allows; returns False after the last restart."""
        budget = RestartBudget(self._policy, self._clock)
        while True:
            # Status 0 means that it was drained (`tandem drain`), which is not a failure: restart it without limit.
            delay_s = self._policy.first_delay_s if await process.wait_ended() == 0 else budget.take_delay_s()
            if delay_s is None:
                self._report(f"{process.exit_summary()}; giving up after {self._policy.count_max} restarts")
                await self._give_up(process)
                return False
            self._report(f"{process.exit_summary()}; restarting in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            try:
                await self._cluster.restart(process.name)
            except StartError:
                continue
            self._report(f"{process.name} is ready again at {process.address} (pid {process.pid})")

    async def _give_up(self, process: ClusterProcess) -> None:
        self._given_up.add(process)
        # A worker may have taken another role than that of its name.
        roles = await self._cluster.present_roles()
        left = [p for p in self._cluster.processes if p not in self._given_up]
        needed = {p.role for p in self._cluster.processes if p.role in ("registry", "frontend", "edge")}
        of_models: dict[str | None, set[str]] = {}
        for worker in (p for p in left if p in self._cluster.workers):
            of_models.setdefault(worker.flags.get("model-name"), set()).add(roles[worker.name])
        serves = any("aggregated" in its or {"prefill", "decode"} <= its for its in of_models.values())
        if not needed <= {roles[p.name] for p in left} or not serves:
            self._hopeless.set()
