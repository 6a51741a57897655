"""What follows the death of a process of a local cluster: one line that says so, a pause, another start.

Owns when nothing can serve any more; how often a start is tried is `restart_budget.py`'s. A cluster goes on with what
is left of it.
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
    """Watches over the processes of a cluster that has been started."""

    def __init__(
        self,
        cluster: LocalCluster,
        tell: Callable[[str], None],
        policy: RestartPolicy | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`tell` is given one line for each event."""
        self._cluster = cluster
        self._tell = tell
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._given_up: set[ClusterProcess] = set()
        self._hopeless = asyncio.Event()

    async def run(self) -> None:
        """Return when nothing can serve any more. Cancel it before the cluster is stopped."""
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
        """Start it again as often as the policy allows; False in the end."""
        budget = RestartBudget(self._policy, self._clock)
        while True:
            # One that ended well was asked to (`tandem drain`): it has not failed, and comes back.
            delay_s = self._policy.first_delay_s if await process.wait_ended() == 0 else budget.take_delay_s()
            if delay_s is None:
                self._tell(f"{process.epitaph()}; given up after {self._policy.count_max} restarts")
                self._give_up(process)
                return False
            self._tell(f"{process.epitaph()}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            try:
                await self._cluster.restart(process.name)
            except StartError:
                continue
            self._tell(f"{process.name} serves again at {process.address} (pid {process.pid})")

    def _give_up(self, process: ClusterProcess) -> None:
        self._given_up.add(process)
        left = {p.role for p in self._cluster.processes if p not in self._given_up}
        needed = {p.role for p in self._cluster.processes if p.role in ("registry", "frontend", "edge")}
        if not needed <= left or not ("aggregated" in left or {"prefill", "decode"} <= left):
            self._hopeless.set()
