"""A cluster of service processes on this machine: started in order, drained in order.

    consul -> registries -> prefill, decode, aggregated workers and the frontends together -> edge
    edge -> frontends -> workers -> registries -> consul

Owns which processes there are, and their directory for temporary files. Used by the command line, tests and benchmarks;
chooses no ports (the OS does) and prints nothing. What follows the death of a process is `restarts.py`'s.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tandem.local_cluster import scrape_targets
from tandem.local_cluster.child_process import ClusterProcess, ProcessState
from tandem.local_cluster.consul import ClusterConsul
from tandem.local_cluster.consul_agent import ConsulAgent
from tandem.service import run_directory
from tandem.tls.paths import Tls

KEPT_PORTS = ("registry", "frontend", "edge")
"""Roles whose address others have been told: one that is started again takes the same port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What a cluster consists of."""

    model: Path
    log_directory: Path | None = None
    """Where the processes log; must be known by the time a cluster is made of it."""
    model_name: str | None = None
    engine: str = "sglang"
    prefill: int = 1
    decode: int = 1
    aggregated: int = 0
    registries: int = 1
    """More than one need a Consul, which keeps what they know."""
    consul: ClusterConsul | None = None
    """Where the registries keep membership; None: in their own memory."""
    frontends: int = 1
    frontend_processes: int = 1
    """Of each frontend."""
    frontend_port: int = 0
    """Of the first frontend; 0: the OS chooses."""
    edge: bool = False
    """Whether an Envoy stands before the frontends, for HTTP."""
    http_port: int = 0
    """Of the edge; 0: the OS chooses."""
    otlp_endpoint: str | None = None
    """Collector that all processes export to; None: nothing is exported, unless the environment says so."""
    tls: Path | None = None
    """Directory that `tandem certs` made: every process presents the certificate of its role. None: plaintext."""
    metrics: bool = False
    """Whether every process has a port for Prometheus, and a file tells of them."""
    targets_file: Path | None = None
    """That file; None: in the log directory."""
    worker_flags: dict[str, str] = field(default_factory=dict)
    """More settings of every worker, by flag name without dashes."""
    role_flags: dict[str, dict[str, str]] = field(default_factory=dict)
    """More settings of the processes of one role: registry, prefill, decode, aggregated, frontend or edge."""


class LocalCluster:
    """Processes of one cluster. Use as an async context manager, or call `start` and `stop`."""

    def __init__(self, spec: ClusterSpec, on_change: Callable[[ClusterProcess], None] = lambda process: None) -> None:
        """`on_change` is called whenever a process changes its state."""
        assert spec.log_directory is not None, "a cluster logs somewhere"
        self.spec = spec
        self.log_directory = spec.log_directory
        self.targets_file = spec.targets_file or spec.log_directory / scrape_targets.FILE
        self.on_change = on_change
        self._run: Path | None = None
        self._serves = False
        self.consul = None if spec.consul is None else spec.consul.make_agent(spec.log_directory, spec.tls)
        self.registries = [self._registry(number) for number in range(spec.registries)]
        self.frontends = [self._frontend(number) for number in range(spec.frontends)]
        self.edge = self._process("edge", {"port": str(spec.http_port)}) if spec.edge else None
        self.workers = [
            self._process(role, {"worker-id": f"{role}-{number}"}, number)
            for role, count in (("prefill", spec.prefill), ("decode", spec.decode), ("aggregated", spec.aggregated))
            for number in range(count)
        ]

    @property
    def registry(self) -> ClusterProcess:
        """The first registry."""
        return self.registries[0]

    @property
    def frontend(self) -> ClusterProcess:
        """The first frontend."""
        return self.frontends[0]

    @property
    def processes(self) -> list[ClusterProcess]:
        """All of them, in the order of their start."""
        return [*self._consuls, *self.registries, *self.workers, *self.frontends, *self._edges]

    @property
    def _consuls(self) -> list[ConsulAgent]:
        return [] if self.consul is None else [self.consul]

    @property
    def _edges(self) -> list[ClusterProcess]:
        return [] if self.edge is None else [self.edge]

    def process(self, name: str) -> ClusterProcess:
        """One of them, by name."""
        return next(process for process in self.processes if process.name == name)

    def dns_name(self, role: str) -> str:
        """Under which Consul's DNS finds the processes of a role."""
        assert self.spec.consul is not None, "names are Consul's"
        return f"{role}.{self.spec.consul.service}.service.consul"

    async def __aenter__(self) -> LocalCluster:
        """Start it."""
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Return when every process serves; ends them all when one does not.

        Raises:
            ConfigError: a process refused a setting.
            StartError: names the process and says why.
        """
        self.log_directory.mkdir(parents=True, exist_ok=True)
        self._run = run_directory.make()
        try:
            await self._bring_up_all(self._consuls)
            await self._bring_up_all(self.registries)
            others = [*self.workers, *self.frontends]
            for process in (*others, *self._edges):
                process.flags["registry"] = ",".join(registry.address for registry in self.registries)
            await self._bring_up_all(others)
            await self._bring_up_all(self._edges)
            self._serves = True
        except BaseException as failure:
            await self.stop()
            if isinstance(failure, BaseExceptionGroup):
                # Several may have failed, most often for one reason: the first says it.
                raise failure.exceptions[0] from None
            raise

    async def stop(self) -> bool:
        """Drain and end everything, in order. Returns whether all ended cleanly. May be called twice.

        Before all of it serves there is nothing to drain, and it ends at once.
        """
        steps: list[Sequence[ClusterProcess]]
        if self._serves:
            steps = [self._edges, self.frontends, self.workers]
        else:
            steps = [[*self._edges, *self.frontends, *self.workers]]
        clean = True
        for processes in (*steps, self.registries, self._consuls):
            clean &= await self._end(processes)
        self._remove_run()
        return clean

    def kill(self) -> None:
        """End everything at once, without draining, and leave nothing behind."""
        for process in self.processes:
            process.kill()
        self._remove_run()

    async def restart(self, name: str) -> ClusterProcess:
        """Start a process again that has ended.

        Raises:
            StartError: it did not start; says why.
        """
        process = self.process(name)
        assert not process.runs, f"{name} still runs"
        await self._bring_up(process)
        return process

    async def _bring_up_all(self, processes: Sequence[ClusterProcess]) -> None:
        async with asyncio.TaskGroup() as group:
            for process in processes:
                group.create_task(self._bring_up(process))

    async def _bring_up(self, process: ClusterProcess) -> None:
        assert self._run is not None, "a process before start()"
        await process.start(self._run)
        self.on_change(process)
        await process.wait_ready()
        if process.role in KEPT_PORTS:
            process.flags["port"] = process.address.rpartition(":")[2]
        if process.metrics_address is not None:
            process.flags["metrics-port"] = process.metrics_address.rpartition(":")[2]
            self._tell_targets()
        self.on_change(process)

    def _tell_targets(self) -> None:
        services = [*self.registries, *self.workers, *self.frontends, *self._edges]
        scrape_targets.write(self.targets_file, services, with_tls=self.spec.tls is not None)

    def _remove_run(self) -> None:
        if self._run is not None:
            shutil.rmtree(self._run, ignore_errors=True)
        scrape_targets.remove(self.targets_file)
        for agent in self._consuls:
            agent.clean()

    async def _end(self, processes: Sequence[ClusterProcess]) -> bool:
        async def end(process: ClusterProcess) -> bool:
            if not process.runs:
                return True
            if process.state is ProcessState.READY:
                process.state = ProcessState.DRAINING
                self.on_change(process)
            status = await process.stop()
            self.on_change(process)
            return status == 0

        return all(await asyncio.gather(*(end(process) for process in processes)))

    def _frontend(self, number: int) -> ClusterProcess:
        port = 0 if number else self.spec.frontend_port
        flags = {"port": str(port), "frontend-id": f"frontend-{number}"}
        if self.spec.frontend_processes > 1:
            flags["processes"] = str(self.spec.frontend_processes)
        return self._process("frontend", flags, number)

    def _registry(self, number: int) -> ClusterProcess:
        consul, tls = self.spec.consul, self.spec.tls
        flags = {} if consul is None else consul.registry_flags(self.consul, tls)
        registry = self._process("registry", {"port": "0", **flags}, number)
        registry.secrets = {} if consul is None else consul.registry_secrets()
        return registry

    def _process(self, role: str, flags: dict[str, str], number: int = 0) -> ClusterProcess:
        spec = self.spec
        # Nobody outside has to look elsewhere before a drain goes on: the edge tries another frontend by itself.
        own: dict[str, str] = {"drain-settle-s": "0.1", "drain-timeout-s": "20", **flags}
        if spec.otlp_endpoint is not None:
            own |= {"otlp-endpoint": spec.otlp_endpoint}
        if spec.metrics:
            own["metrics-port"] = "0"
        if role not in ("registry", "edge"):
            own |= {"model": str(spec.model), "model-name": spec.model_name or spec.model.resolve().name}
        if role in ("prefill", "decode", "aggregated"):
            own |= {"engine": spec.engine, **spec.worker_flags}
        if role == "aggregated":
            own |= {"role": "aggregated"}
        if spec.tls is not None:
            own |= _tls_flags(spec.tls, role)
        alone = role == "edge" or {"frontend": spec.frontends, "registry": spec.registries}.get(role) == 1
        name = role if alone else f"{role}-{number}"
        if role == "frontend":
            own |= {"frontend-id": name}
        own |= spec.role_flags.get(role, {})
        return ClusterProcess(name, role, own, self.log_directory)


def _tls_flags(directory: Path, role: str) -> dict[str, str]:
    """What a process of a role presents. An aggregated worker is a decode worker that does both halves."""
    tls = Tls.in_directory(directory, "decode" if role == "aggregated" else role)
    if role == "edge":
        # HTTP clients see the same certificate as the frontends, and are asked for none.
        listener = {"tls-cert": str(tls.cert), "tls-key": str(tls.key)}
        return {
            **listener,
            **{f"upstream-{key}": value for key, value in listener.items()},
            "upstream-tls-ca": str(tls.ca),
        }
    return {"tls-cert": str(tls.cert), "tls-key": str(tls.key), "tls-ca": str(tls.ca)}
