"""One process of a cluster on this machine: its start, its address, its end, and the sentence that says how it ended.

Owns the process, its group (an engine's children are in it) and its log. Which processes there are, and their order,
is `cluster.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from enum import Enum
from pathlib import Path

from tandem.errors import ConfigError, StartError
from tandem.service import parent_death, run_directory

ANNOUNCE_POLL_S = 0.03
STOP_TIMEOUT_S = 45.0
"""Longer than any service's own drain and stop with the settings of `cluster.py`."""
ABANDON_TIMEOUT_S = 1.8
"""For one that does not serve yet: a little longer than a service takes to give its start up."""
MODULES = {
    "registry": "tandem_registry",
    "prefill": "tandem_prefill",
    "decode": "tandem_decode",
    "aggregated": "tandem_decode",
    "frontend": "tandem_frontend",
    "edge": "tandem_edge",
}
CONSUL_SECRETS = frozenset({"CONSUL_HTTP_TOKEN", "CONSUL_HTTP_AUTH"})
LEVELS = "DEBUG|INFO|WARNING|ERROR|CRITICAL"
LOGGED = re.compile(
    rf"\d{{4}}-\d\d-\d\d \S+ (?P<level>{LEVELS}) \S+ (?P<text>.*)"
    rf'|\{{"time": "[^"]*", "level": "(?P<json_level>{LEVELS})".*?"message": (?P<json>"(?:[^"\\]|\\.)*").*'
)
"""A line of ours as text, or as JSON; the children of an engine log as they like."""


class ProcessState(Enum):
    """Where a process of the cluster is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
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
        self.metrics_address: str | None = None
        """host:port where it is scraped, once ready; None: nowhere."""
        self.secrets: dict[str, str] = {}
        """Variables of this process only; a command line is open to everybody on the machine."""
        self._announce = log_directory / f"{name}.announce.json"
        self._log_begin_bytes = 0
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

    @property
    def runs(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self, run: Path) -> None:
        """Start it; `wait_ready` tells when it serves. `run` is the cluster's directory for temporary files."""
        self.state = ProcessState.STARTING
        self._announce.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._log_begin_bytes = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the parent, which drains its children in order.
                start_new_session=True,
                env=self._environment(run),
            )

    def _command(self) -> list[str]:
        flags = {**self.flags, "announce-file": str(self._announce)}
        return [sys.executable, "-m", MODULES[self.role], *(f"--{key}={value}" for key, value in flags.items())]

    def _environment(self, run: Path) -> dict[str, str]:
        """This process's, without what is only for Consul, and with what is only for this one."""
        inherited = {key: value for key, value in os.environ.items() if key not in CONSUL_SECRETS}
        own = {parent_death.VARIABLE: str(os.getpid()), run_directory.VARIABLE: str(run)}
        return {**inherited, **own, **self.secrets}

    async def wait_ready(self) -> None:
        """Return when it serves.

        Raises:
            ConfigError: it refused a setting.
            StartError: it ended first; the message is its own last sentence.
        """
        assert self._process is not None, "wait_ready() before start()"
        while (address := await self._serving_at()) is None:
            if self._process.returncode is not None:
                self.state = ProcessState.ENDED
                words = self.last_words() or f"{self._ending()} and said nothing; log: {self.log}"
                if self._process.returncode == ConfigError.exit_status:
                    raise ConfigError(f"a setting of {self.name}", words)
                raise StartError(f"{self.name} did not start: {words}")
            await asyncio.sleep(ANNOUNCE_POLL_S)
        self.address = address
        self.state = ProcessState.READY

    async def _serving_at(self) -> str | None:
        """Its address; None while it does not serve. A file's appearance is nothing that asyncio can wait for."""
        if not self._announce.exists():
            return None
        announced = json.loads(self._announce.read_text())
        address: str = announced["address"]
        if announced["metrics_port"]:
            self.metrics_address = f"{address.rpartition(':')[0]}:{announced['metrics_port']}"
        return address

    async def wait_ended(self) -> int:
        """Return its exit status when it ends; nothing of its group is left then."""
        process = self._process
        assert process is not None, "wait_ended() before start()"
        status = await process.wait()
        _kill_group(process.pid)
        if process is self._process:
            self.state = ProcessState.ENDED
        return status

    async def stop(self) -> int | None:
        """Ask it to end and wait; kill it when it takes too long. Returns the exit status."""
        if self._process is None:
            return None
        if self.runs:
            timeout_s = ABANDON_TIMEOUT_S if self.state is ProcessState.STARTING else STOP_TIMEOUT_S
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        return await self.wait_ended()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself; harmless after its end."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """End it and its children at once; harmless after its end."""
        if self.runs:
            _kill_group(self.pid)

    def epitaph(self) -> str:
        """How it ended, why, and where its log is, in one line."""
        words = self.last_words() if self.exit_status is not None and self.exit_status > 0 else None
        return f"{self.name} {self._ending()}{f' ({words})' if words else ''}; log: {self.log}"

    def last_words(self) -> str | None:
        """The last line of this start's log that can say why it ended; None when none can."""
        program = f"tandem-{MODULES[self.role].removeprefix('tandem').lstrip('_.')}: "
        for line in reversed(self._lines()):
            logged = LOGGED.fullmatch(line.strip())
            if line.strip() and (logged is None or (logged["level"] or logged["json_level"]) in ("ERROR", "CRITICAL")):
                return _said(logged, line.strip()).removeprefix(program)
        return None

    def _lines(self) -> list[str]:
        """What this start has logged."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(self._log_begin_bytes)
            return log.read().decode(errors="replace").splitlines()

    def _ending(self) -> str:
        status = self.exit_status
        assert status is not None, "it still runs"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _said(logged: re.Match[str] | None, line: str) -> str:
    """What a line says."""
    if logged is None:
        return line
    return str(json.loads(logged["json"])) if logged["json"] else logged["text"]


def _kill_group(pid: int) -> None:
    """A process's group has its process id, and lives as long as any process in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
