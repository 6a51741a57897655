"""A cluster whose every link and process a test can break: registries, workers and frontends on simulated engines.

Owns the processes, the links between them and their order of start. Consul's agents are not among them: their address
is given. Registries reach Consul over a link each; one worker, the one called `CUT_WORKER`, is reached and reaches the
registries over links too, so that its network can be cut whole.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tandem.local_cluster.child_process import ClusterProcess
from tandem.service import run_directory
from tests.faults.support.cut_proxy import Cut, CutProxy, cut_proxy
from tests.faults.support.process_faults import free_port
from tests.faults.support.views import Views, watched_views

REPOSITORY = Path(__file__).parents[3]
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"
CUT_WORKER = "decode-1"
OUTER_HOST = "127.0.0.2"
"""Where `CUT_WORKER` is reached: another address of loopback, at which a link listens on the worker's own port."""


DRAWN = {"routing-policy": "random"}
"""Settings of frontends that send requests to every worker: a fault of a certain one needs some there. Routing by load
may leave an idle one without any.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a cluster consists of."""

    consul: str | None = None
    """host:port of Consul's HTTP API; None: membership is in the memory of the only registry."""
    registries: int = 2
    frontends: int = 2
    prefill: int = 2
    decode: int = 2
    lease_s: float = 2.0
    frontend_flags: dict[str, str] = field(default_factory=dict)
    """More settings of every frontend."""
    worker_flags: dict[str, str] = field(
        default_factory=lambda: {"engine": "simulated", "engine-extra": '{"decode_step_s": 0.005}'}
    )


class FaultCluster:
    """See the module; use `fault_cluster`."""

    def __init__(self, plan: Plan, logs: Path, stack: AsyncExitStack) -> None:
        assert plan.consul is not None or plan.registries == 1, "registries share a view over Consul only"
        self.plan = plan
        self.logs = logs
        self._stack = stack
        self._run = run_directory.make()
        self.processes: dict[str, ClusterProcess] = {}
        self.consul_links: list[CutProxy] = []
        self.worker_links: list[CutProxy] = []
        """All ways to and from `CUT_WORKER`."""

    @property
    def links(self) -> list[CutProxy]:
        """All that can be cut."""
        return [*self.consul_links, *self.worker_links]

    @property
    def registries(self) -> list[ClusterProcess]:
        return self.of_role("registry")

    @property
    def frontends(self) -> list[ClusterProcess]:
        return self.of_role("frontend")

    @property
    def workers(self) -> list[ClusterProcess]:
        return [*self.of_role("prefill"), *self.of_role("decode")]

    def of_role(self, role: str) -> list[ClusterProcess]:
        return [process for process in self.processes.values() if process.role == role]

    async def start(self) -> None:
        """Return when everything serves."""
        self._stack.push_async_callback(self._stop)
        for number in range(self.plan.registries):
            await self._start_registry(number)
        registries = ",".join(registry.address for registry in self.registries)
        workers = [("prefill", number) for number in range(self.plan.prefill)]
        workers += [("decode", number) for number in range(self.plan.decode)]
        async with asyncio.TaskGroup() as group:
            for role, number in workers:
                group.create_task(self._start_worker(f"{role}-{number}", role, registries))
            for number in range(self.plan.frontends):
                name = f"frontend-{number}"
                group.create_task(self.add(name, "frontend", await self.frontend_flags(name, registries)))

    async def add(self, name: str, role: str, flags: dict[str, str]) -> ClusterProcess:
        """Start one more process; it keeps its port when it is started again."""
        own = {"port": str(free_port()), "drain-settle-s": "0", "drain-timeout-s": "5", **flags}
        process = self.processes[name] = ClusterProcess(name, role, own, self.logs)
        process.secrets = self.environment(name)
        await process.start(self._run)
        await process.wait_ready()
        return process

    def environment(self, name: str) -> dict[str, str]:
        """Variables of that process only."""
        return {}

    async def restart(self, *names: str) -> None:
        """Start processes again that have ended, at their addresses."""
        for name in names:
            await self.begin_restart(name)
        for name in names:
            await self.processes[name].wait_ready()

    async def begin_restart(self, name: str) -> None:
        """Start a process again that has ended, at its address, and do not wait until it is ready."""
        assert not self.processes[name].runs, f"{name} still runs"
        await self.processes[name].start(self._run)

    def worker_flags(self, name: str, registries: str) -> dict[str, str]:
        """Settings of a worker of that name."""
        return {"worker-id": name, "model": str(DEMO_MODEL), "registry": registries, **self.plan.worker_flags}

    async def frontend_flags(self, name: str, registries: str) -> dict[str, str]:
        """Settings of a frontend of that name."""
        return {"model": str(DEMO_MODEL), "registry": registries, "frontend-id": name, **self.plan.frontend_flags}

    async def cut_off(self, cut: Cut) -> None:
        """Cut the whole network of `CUT_WORKER`."""
        for link in self.worker_links:
            await link.sever(cut)

    async def reconnect(self) -> None:
        """End that."""
        for link in self.worker_links:
            await link.heal()

    @asynccontextmanager
    async def views(self) -> AsyncIterator[Views]:
        """What all registries and frontends say while the block runs."""
        registries = [registry.address for registry in self.registries]
        async with watched_views(registries, [frontend.address for frontend in self.frontends]) as views:
            yield views

    async def whole(self, views: Views, within_s: float = 30.0) -> None:
        """Return when every registry and every frontend knows exactly the workers that run."""
        running = {worker.name for worker in self.workers if worker.runs}
        await views.all_show(running, within_s=within_s)

    async def restore(self, views: Views) -> None:
        """Heal all links, start again whatever has ended, and return when all know each other."""
        for link in self.links:
            if link.cut is not Cut.NONE:
                await link.heal()
        await self.restart(*(name for name, process in self.processes.items() if not process.runs))
        await self.whole(views)

    async def _start_registry(self, number: int) -> None:
        flags = {"lease-ttl-s": str(self.plan.lease_s)}
        if self.plan.consul is not None:
            link = await self._stack.enter_async_context(cut_proxy(self.plan.consul))
            self.consul_links.append(link)
            flags |= {"backend": "consul", "consul-address": link.address}
        await self.add(f"registry-{number}", "registry", flags)

    async def _start_worker(self, name: str, role: str, registries: str) -> None:
        flags = self.worker_flags(name, registries)
        if name == CUT_WORKER:
            port = free_port(OUTER_HOST)
            outward = [
                await self._stack.enter_async_context(cut_proxy(registry.address)) for registry in self.registries
            ]
            inward = await self._stack.enter_async_context(cut_proxy(f"127.0.0.1:{port}", OUTER_HOST, port))
            self.worker_links = [*outward, inward]
            flags |= {"registry": ",".join(link.address for link in outward)}
            flags |= {"port": str(port), "advertise-host": OUTER_HOST}
        await self.add(name, role, flags)

    async def _stop(self) -> None:
        # Nothing is drained: what a drain does is tested elsewhere.
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            await process.stop()
        shutil.rmtree(self._run, ignore_errors=True)


@asynccontextmanager
async def fault_cluster(logs: Path, plan: Plan) -> AsyncIterator[FaultCluster]:
    """A cluster as long as the block; its logs go there."""
    async with AsyncExitStack() as stack:
        cluster = FaultCluster(plan, logs, stack)
        await cluster.start()
        yield cluster
