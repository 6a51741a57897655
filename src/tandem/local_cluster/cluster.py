"""A cluster of service processes on this machine: starts and drains them in order.

    consul -> registries -> prefill, decode, aggregated workers and the frontends together -> edge
    edge -> frontends -> workers -> registries -> consul

Owns the set of processes and their directory for temporary files. Used by the command line, tests and benchmarks; the
OS chooses the ports. Prints nothing. `restarts.py` restarts processes that exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tandem.client import calls
from tandem.domain.worker import EMBED
from tandem.errors import TandemError
from tandem.local_cluster import scrape_targets
from tandem.local_cluster.child_process import ClusterProcess, ProcessState
from tandem.local_cluster.consul import ClusterConsul
from tandem.local_cluster.consul_agent import ConsulAgent
from tandem.rpc.convert import ROLE_BY_NUMBER
from tandem.service import owned_directory, run_directory
from tandem.tls.paths import Tls, client_tls

KEPT_PORTS = ("registry", "frontend", "edge")
"""Roles whose address other processes have in their settings: after a restart they listen on the same port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The processes of a cluster and their settings."""

    model: Path
    log_directory: Path | None = None
    """Directory of the log files; required to create a LocalCluster."""
    model_name: str | None = None
    more_models: Mapping[str, Path] = field(default_factory=dict)
    """Further models by name. Each has as many workers of each role as the first one."""
    embedding_models: Mapping[str, Path] = field(default_factory=dict)
    """Models that compute embeddings, by name. Each has one aggregated worker, which `aggregated` does not count."""
    engine: str = "sglang"
    prefill: int = 1
    decode: int = 1
    aggregated: int = 0
    host: str = "127.0.0.1"
    """Address of this machine on which every process listens, and which it advertises."""
    registries: int = 1
    """More than one require Consul as their shared membership store."""
    consul: ClusterConsul | None = None
    """Membership store of the registries; None: the memory of the one registry."""
    frontends: int = 1
    frontend_processes: int = 1
    """Processes of each frontend."""
    frontend_port: int = 0
    """Port of the first frontend; 0: the OS chooses."""
    edge: bool = False
    """Whether an Envoy for HTTP runs in front of the frontends."""
    http_port: int = 0
    """HTTP port of the edge; 0: the OS chooses."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector of all processes; None: no export, unless the environment variables set one."""
    tls: Path | None = None
    """Directory of `tandem certs`: every process presents the certificate of its role. None: plaintext."""
    metrics: bool = False
    """Whether every process has a port for Prometheus, listed in `targets_file`."""
    targets_file: Path | None = None
    """Target file for Prometheus (`file_sd_configs`); None: in the log directory."""
    console_port: int | None = None
    """Port of the console of the first frontend; None: there is none."""
    console_keys: Path | None = None
    """File of the console's keys; with `console_port`."""
    worker_flags: dict[str, str] = field(default_factory=dict)
    """Additional flags of every worker, by name without dashes."""
    role_flags: dict[str, dict[str, str]] = field(default_factory=dict)
    """Additional flags by role: registry, prefill, decode, aggregated, frontend or edge."""

    @property
    def first_name(self) -> str:
        """Name of the first model."""
        return self.model_name or self.model.resolve().name


class LocalCluster:
    """Processes of one cluster. Use as an async context manager, or call `start` and `stop`."""

    def __init__(self, spec: ClusterSpec, on_change: Callable[[ClusterProcess], None] = lambda process: None) -> None:
        """`on_change` is called whenever a process changes its state."""
        assert spec.log_directory is not None, "log_directory is required"
        self.spec = spec
        self.log_directory = spec.log_directory
        self.targets_file = spec.targets_file or spec.log_directory / scrape_targets.FILE
        self.on_change = on_change
        self._run: Path | None = None
        """Directory of temporary files, made with the first process."""
        self._serves = False
        self.consul = None if spec.consul is None else spec.consul.make_agent(spec.log_directory, spec.tls)
        self.registries = [self._registry(number) for number in range(spec.registries)]
        self.frontends = [self._frontend(number) for number in range(spec.frontends)]
        self.edge = self._process("edge", {"port": str(spec.http_port)}) if spec.edge else None
        models = [{}, *({"model": str(path), "model-name": name} for name, path in spec.more_models.items())]
        self.workers = [
            self._process(role, {"worker-id": f"{role}-{number}", **models[number // count]}, number)
            for role, count in (("prefill", spec.prefill), ("decode", spec.decode), ("aggregated", spec.aggregated))
            for number in range(len(models) * count)
        ]
        self.workers += [
            self._embedding_worker(number, name, path)
            for number, (name, path) in enumerate(spec.embedding_models.items(), len(models) * spec.aggregated)
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
        """All processes, in start order."""
        return [*self._consuls, *self.registries, *self.workers, *self.frontends, *self._edges]

    @property
    def _consuls(self) -> list[ConsulAgent]:
        return [] if self.consul is None else [self.consul]

    @property
    def _edges(self) -> list[ClusterProcess]:
        return [] if self.edge is None else [self.edge]

    def process(self, name: str) -> ClusterProcess:
        """The process of that name."""
        return next(process for process in self.processes if process.name == name)

    async def present_roles(self) -> dict[str, str]:
        """Role of each process by name: of a registered worker the one that it has now, else the one it starts with."""
        roles = {process.name: process.role for process in self.processes}
        try:
            listed = await calls.list_workers(self.registry.address, tls=client_tls(self.spec.tls))
        except TandemError:
            # Without a registry the first roles are the best guess.
            return roles
        now = {entry.worker.worker_id: ROLE_BY_NUMBER[entry.worker.role].value for entry in listed}
        return roles | {name: role for name, role in now.items() if name in roles}

    def dns_name(self, role: str) -> str:
        """DNS name, served by Consul, of the processes of a role."""
        assert self.spec.consul is not None, "DNS names require Consul"
        return f"{role}.{self.spec.consul.service}.service.consul"

    async def __aenter__(self) -> LocalCluster:
        """Start the cluster."""
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Return when every process is ready; stops all of them if one fails.

        Raises:
            ConfigError: a process rejected a setting.
            StartError: names the process and the reason.
        """
        self.log_directory.mkdir(parents=True, exist_ok=True)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.stop)
            await self._bring_up_all(self._consuls)
            await self._bring_up_all(self.registries)
            others = [*self.workers, *self.frontends]
            for process in (*others, *self._edges):
                process.flags["registry"] = ",".join(registry.address for registry in self.registries)
            await self._bring_up_all(others)
            await self._bring_up_all(self._edges)
            self._serves = True
            undo.pop_all()

    async def stop(self) -> bool:
        """Drain and stop all processes, in order. Returns whether all exited with status 0. May be called twice.

        Before all of them are ready there is nothing to drain: then edges, frontends and workers stop at the same time.
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
        """Kill all processes without draining, and remove temporary files."""
        for process in self.processes:
            process.kill()
        self._remove_run()

    async def restart(self, name: str) -> ClusterProcess:
        """Restart a process that has exited.

        Raises:
            StartError: the start failed; the message says why.
        """
        process = self.process(name)
        assert not process.runs, f"{name} is still running"
        await self._bring_up(process)
        return process

    async def _bring_up_all(self, processes: Sequence[ClusterProcess]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for process in processes:
                    group.create_task(self._bring_up(process))
        except BaseExceptionGroup as failures:
            # Several processes may have failed, mostly for the same reason: report the first.
            raise failures.exceptions[0] from None

    async def _bring_up(self, process: ClusterProcess) -> None:
        if self._run is None:
            self._run = run_directory.make()
        await process.start(self._run)
        self.on_change(process)
        await process.wait_ready()
        if process.role in KEPT_PORTS:
            process.flags["port"] = process.address.rpartition(":")[2]
        if process.metrics_address is not None:
            process.flags["metrics-port"] = process.metrics_address.rpartition(":")[2]
            self._write_targets()
        self.on_change(process)

    def _write_targets(self) -> None:
        services = [*self.registries, *self.workers, *self.frontends, *self._edges]
        scrape_targets.write(self.targets_file, services, with_tls=self.spec.tls is not None)

    def _remove_run(self) -> None:
        if self._run is not None:
            # Files in shared memory of workers that were killed.
            owned_directory.sweep(self._run)
            shutil.rmtree(self._run, ignore_errors=True)
            self._run = None
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
        if number == 0 and self.spec.console_port is not None:
            flags |= {"console-port": str(self.spec.console_port), "console-keys": str(self.spec.console_keys)}
        return self._process("frontend", flags, number)

    def _registry(self, number: int) -> ClusterProcess:
        consul, tls = self.spec.consul, self.spec.tls
        flags = {} if consul is None else consul.registry_flags(self.consul, tls)
        registry = self._process("registry", {"port": "0", **flags}, number)
        registry.secrets = {} if consul is None else consul.registry_secrets()
        return registry

    def _embedding_worker(self, number: int, name: str, path: Path) -> ClusterProcess:
        flags = {"worker-id": f"aggregated-{number}", "model": str(path), "model-name": name, "task": EMBED}
        return self._process("aggregated", flags, number)

    def _process(self, role: str, flags: dict[str, str], number: int = 0) -> ClusterProcess:
        spec = self.spec
        # A short settle time is enough: there is no external load balancer, and the edge retries on another frontend.
        own: dict[str, str] = {"host": spec.host, "drain-settle-s": "0.1", "drain-timeout-s": "20"}
        if spec.otlp_endpoint is not None:
            own |= {"otlp-endpoint": spec.otlp_endpoint}
        if spec.metrics:
            own["metrics-port"] = "0"
        # Frontends of several models have none of their own: they read each tokenizer from a worker.
        if role not in ("registry", "edge") and not (role == "frontend" and spec.more_models):
            own |= {"model": str(spec.model), "model-name": spec.first_name}
        own |= flags
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
    """TLS flags of a role. An aggregated worker presents the certificate of decode: it runs the same program."""
    tls = Tls.in_directory(directory, "decode" if role == "aggregated" else role)
    if role == "edge":
        # HTTP clients and frontends get the same certificate; HTTP clients need none of their own.
        listener = {"tls-cert": str(tls.cert), "tls-key": str(tls.key)}
        return {
            **listener,
            **{f"upstream-{key}": value for key, value in listener.items()},
            "upstream-tls-ca": str(tls.ca),
        }
    return {"tls-cert": str(tls.cert), "tls-key": str(tls.key), "tls-ca": str(tls.ca)}
