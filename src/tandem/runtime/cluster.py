"""A cluster of service processes on this machine: started in order, watched, drained in order.

    registry -> prefill, decode, aggregated workers and the frontends together -> edge
    edge -> frontends -> workers -> registry

Owns the processes and their logs. Used by the command line, tests and benchmarks; chooses no ports (the OS does) and
prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tandem.errors import StartError
from tandem.runtime.parent import VARIABLE
from tandem.tls.paths import Tls

ANNOUNCE_POLL_S = 0.03
STOP_TIMEOUT_S = 45.0
"""Longer than any service's own drain and stop with the settings below."""
MODULES = {
    "registry": "tandem_registry",
    "prefill": "tandem_prefill",
    "decode": "tandem_decode",
    "aggregated": "tandem_decode",
    "frontend": "tandem_frontend",
    "edge": "tandem.edge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What a cluster consists of."""

    model: Path
    log_directory: Path
    model_name: str | None = None
    engine: str = "sglang"
    prefill: int = 1
    decode: int = 1
    aggregated: int = 0
    frontends: int = 1
    frontend_port: int = 0
    """Of the first frontend; 0: the OS chooses."""
    edge: bool = False
    """Whether an Envoy stands before the frontends, for HTTP."""
    http_port: int = 0
    """Of the edge; 0: the OS chooses."""
    tls: Path | None = None
    """Directory that `tandem certs` made: every process presents the certificate of its role. None: plaintext."""
    worker_flags: dict[str, str] = field(default_factory=dict)
    """More settings of every worker, by flag name without dashes."""
    role_flags: dict[str, dict[str, str]] = field(default_factory=dict)
    """More settings of the processes of one role: registry, prefill, decode, aggregated, frontend or edge."""


class ProcessState(Enum):
    """Where a process of the cluster is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    ENDED = "ended"


class ClusterProcess:
    """One service process."""

    def __init__(self, name: str, role: str, flags: dict[str, str], log_directory: Path) -> None:
        self.name = name
        self.role = role
        self.flags = flags
        self.log = log_directory / f"{name}.log"
        self.state = ProcessState.STARTING
        self.address = ""
        """host:port, once ready."""
        self._announce = log_directory / f"{name}.announce.json"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "pid before start()"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Start it; `wait_ready` tells when it serves."""
        self.state = ProcessState.STARTING
        self._announce.unlink(missing_ok=True)
        flags = {**self.flags, "announce-file": str(self._announce)}
        arguments = [f"--{key}={value}" for key, value in flags.items()]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                MODULES[self.role],
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the parent, which drains its children in order.
                start_new_session=True,
                env={**os.environ, VARIABLE: str(os.getpid())},
            )

    async def wait_ready(self) -> None:
        """Return when it serves.

        Raises:
            StartError: it ended first; the message is its own last sentence.
        """
        assert self._process is not None, "wait_ready() before start()"
        # A file's appearance is nothing that asyncio can wait for.
        while not self._announce.exists():
            if self._process.returncode is not None:
                self.state = ProcessState.ENDED
                raise StartError(f"{self.name} did not start: {self.last_words()}")
            await asyncio.sleep(ANNOUNCE_POLL_S)
        self.address = json.loads(self._announce.read_text())["address"]
        self.state = ProcessState.READY

    async def wait_ended(self) -> int:
        """Return its exit status when it ends."""
        assert self._process is not None, "wait_ended() before start()"
        return await self._process.wait()

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Ask it to end and wait; kill it when it takes too long. Returns the exit status."""
        if self._process is None:
            return None
        if self._process.returncode is None:
            self.state = ProcessState.STOPPING
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                self.signal(signal.SIGKILL)
                await self._process.wait()
        self.state = ProcessState.ENDED
        return self._process.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself; harmless after its end."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def last_words(self) -> str:
        """The last line of its log, without the name it puts in front."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        last = lines[-1] if lines else f"it ended with status {self.exit_status} and said nothing"
        return last.removeprefix(f"tandem-{MODULES[self.role].removeprefix('tandem').lstrip('_.')}: ")


class LocalCluster:
    """Processes of one cluster. Use as an async context manager, or call `start` and `stop`."""

    def __init__(self, spec: ClusterSpec, on_change: Callable[[ClusterProcess], None] = lambda process: None) -> None:
        """`on_change` is called whenever a process changes its state."""
        self.spec = spec
        self.on_change = on_change
        self.registry = self._process("registry", {"port": "0"})
        self.frontends = [
            self._process("frontend", {"port": str(0 if number else spec.frontend_port)}, number)
            for number in range(spec.frontends)
        ]
        self.edge = self._process("edge", {"port": str(spec.http_port)}) if spec.edge else None
        self.workers = [
            self._process(role, {"worker-id": f"{role}-{number}"}, number)
            for role, count in (("prefill", spec.prefill), ("decode", spec.decode), ("aggregated", spec.aggregated))
            for number in range(count)
        ]

    @property
    def frontend(self) -> ClusterProcess:
        """The first frontend."""
        return self.frontends[0]

    @property
    def processes(self) -> list[ClusterProcess]:
        """All of them, in the order of their start."""
        return [self.registry, *self.workers, *self.frontends, *self._edges]

    @property
    def _edges(self) -> list[ClusterProcess]:
        return [] if self.edge is None else [self.edge]

    def process(self, name: str) -> ClusterProcess:
        """One of them, by name."""
        return next(process for process in self.processes if process.name == name)

    async def __aenter__(self) -> LocalCluster:
        """Start it."""
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Return when every process serves; stops them all when one does not.

        Raises:
            StartError: names the process and says why.
        """
        self.spec.log_directory.mkdir(parents=True, exist_ok=True)
        try:
            await self._bring_up(self.registry)
            others = [*self.workers, *self.frontends]
            for process in others:
                process.flags["registry"] = self.registry.address
            async with asyncio.TaskGroup() as group:
                for process in others:
                    group.create_task(self._bring_up(process))
            for edge in self._edges:
                edge.flags["frontends"] = ",".join(frontend.address for frontend in self.frontends)
                await self._bring_up(edge)
        except BaseException as failure:
            await self.stop()
            if isinstance(failure, BaseExceptionGroup):
                # Several may have failed, most often for one reason: the first says it.
                raise failure.exceptions[0] from None
            raise

    async def stop(self) -> bool:
        """Drain and end everything, in order. Returns whether all ended cleanly. May be called twice."""
        clean = await self._end(self._edges)
        clean &= await self._end(self.frontends)
        clean &= await self._end(self.workers)
        clean &= await self._end([self.registry])
        return clean

    async def wait_failed(self) -> ClusterProcess:
        """Return the first process that ends by itself."""
        ends = {asyncio.create_task(process.wait_ended()): process for process in self.processes}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            process = ends[done.pop()]
            process.state = ProcessState.ENDED
            return process
        finally:
            for task in ends:
                task.cancel()

    async def restart(self, name: str) -> ClusterProcess:
        """Start a process again that has ended."""
        process = self.process(name)
        assert process.exit_status is not None, f"{name} still runs"
        await self._bring_up(process)
        return process

    def kill(self) -> None:
        """End everything at once, without draining."""
        for process in self.processes:
            process.signal(signal.SIGKILL)

    async def _bring_up(self, process: ClusterProcess) -> None:
        await process.start()
        self.on_change(process)
        await process.wait_ready()
        self.on_change(process)

    async def _end(self, processes: Sequence[ClusterProcess]) -> bool:
        async def end(process: ClusterProcess) -> bool:
            was_running = process.exit_status is None
            status = await process.stop()
            self.on_change(process)
            return not was_running or status in (0, None)

        return all(await asyncio.gather(*(end(process) for process in processes)))

    def _process(self, role: str, flags: dict[str, str], number: int = 0) -> ClusterProcess:
        spec = self.spec
        # Nobody outside has to look elsewhere before a drain goes on: the edge tries another frontend by itself.
        own: dict[str, str] = {"drain-settle-s": "0.1", "drain-timeout-s": "20", **flags}
        if role not in ("registry", "edge"):
            own |= {"model": str(spec.model), "model-name": spec.model_name or spec.model.resolve().name}
        if role in ("prefill", "decode", "aggregated"):
            own |= {"engine": spec.engine, **spec.worker_flags}
        if role == "aggregated":
            own |= {"role": "aggregated"}
        if spec.tls is not None:
            own |= _tls_flags(spec.tls, role)
        own |= spec.role_flags.get(role, {})
        alone = role in ("registry", "edge") or (role == "frontend" and spec.frontends == 1)
        name = role if alone else f"{role}-{number}"
        return ClusterProcess(name, role, own, spec.log_directory)


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
