"""One process of a cluster on this machine: its start, address, stop, and the reason of its exit.

Owns the process, its process group (which contains an engine's children) and its log. `cluster.py` owns the set of
processes and their order.
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
"""Longer than the drain and stop of any service with the settings of `cluster.py`."""
ABANDON_TIMEOUT_S = 1.8
"""Stop timeout of a process that is not ready yet: a little longer than a service takes to abort its start."""
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
"""A log line of a service, as text or as JSON. An engine's children log in other formats."""


class ProcessState(Enum):
    """Lifecycle state of a process."""

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
        """host:port of the metrics endpoint, once ready; None: there is none."""
        self.secrets: dict[str, str] = {}
        """Environment variables of this process only: every user of the machine can read command lines."""
        self._announce = log_directory / f"{name}.announce.json"
        self._log_begin_bytes = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id of the running process."""
        assert self._process is not None, "pid before start()"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it is running; negative: killed by that signal."""
        return None if self._process is None else self._process.returncode

    @property
    def runs(self) -> bool:
        """Whether it has been started and has not exited."""
        return self._process is not None and self._process.returncode is None

    async def start(self, run: Path) -> None:
        """Start it; `wait_ready` returns when it is ready. `run` is the cluster's directory for temporary files."""
        self.state = ProcessState.STARTING
        self._announce.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._log_begin_bytes = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal must reach the parent only, which drains its children in order.
                start_new_session=True,
                env=self._environment(run),
            )

    def _command(self) -> list[str]:
        flags = {**self.flags, "announce-file": str(self._announce)}
        return [sys.executable, "-m", MODULES[self.role], *(f"--{key}={value}" for key, value in flags.items())]

    def _environment(self, run: Path) -> dict[str, str]:
        """The parent's environment without Consul's secrets, and with this process's own variables."""
        inherited = {key: value for key, value in os.environ.items() if key not in CONSUL_SECRETS}
        own = {parent_death.VARIABLE: str(os.getpid()), run_directory.VARIABLE: str(run)}
        return {**inherited, **own, **self.secrets}

    async def wait_ready(self) -> None:
        """Return when it is ready.

        Raises:
            ConfigError: it rejected a setting.
            StartError: it exited first; the message contains its last log line.
        """
        assert self._process is not None, "wait_ready() before start()"
        while (address := await self._serving_at()) is None:
            if self._process.returncode is not None:
                self.state = ProcessState.ENDED
                reason = self.last_words() or f"{self._ending()} without a log line; log: {self.log}"
                if self._process.returncode == ConfigError.exit_status:
                    raise ConfigError(f"a setting of {self.name}", reason)
                raise StartError(f"{self.name} did not start: {reason}")
            await asyncio.sleep(ANNOUNCE_POLL_S)
        self.address = address
        self.state = ProcessState.READY

    async def _serving_at(self) -> str | None:
        """Its address; None while it is not ready. Polled, because asyncio cannot wait for a file to appear."""
        if not self._announce.exists():
            return None
        announced = json.loads(self._announce.read_text())
        address: str = announced["address"]
        if announced["metrics_port"]:
            self.metrics_address = f"{address.rpartition(':')[0]}:{announced['metrics_port']}"
        return address

    async def wait_ended(self) -> int:
        """Return its exit status when it exits; its remaining process group is killed."""
        process = self._process
        assert process is not None, "wait_ended() before start()"
        status = await process.wait()
        _kill_group(process.pid)
        if process is self._process:
            self.state = ProcessState.ENDED
        return status

    async def stop(self) -> int | None:
        """Send SIGTERM and wait; kill it after a timeout. Returns the exit status."""
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
        """Send a signal to the process itself; does nothing after its exit."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it and its children at once; does nothing after its exit."""
        if self.runs:
            _kill_group(self.pid)

    def log_emptied(self) -> None:
        """Its log has been emptied (`log_rotation`): what follows is of this start."""
        self._log_begin_bytes = 0

    def exit_summary(self) -> str:
        """How and why it exited, and the path of its log, in one line."""
        reason = self.last_words() if self.exit_status is not None and self.exit_status > 0 else None
        return f"{self.name} {self._ending()}{f' ({reason})' if reason else ''}; log: {self.log}"

    def last_words(self) -> str | None:
        """The last log line of this start that says why it exited: an error, or not in our format; None: none."""
        program = f"tandem-{MODULES[self.role].removeprefix('tandem').lstrip('_.')}: "
        for line in reversed(self._lines()):
            logged = LOGGED.fullmatch(line.strip())
            if line.strip() and (logged is None or (logged["level"] or logged["json_level"]) in ("ERROR", "CRITICAL")):
                return _message(logged, line.strip()).removeprefix(program)
        return None

    def _lines(self) -> list[str]:
        """The log lines since this start."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(self._log_begin_bytes)
            return log.read().decode(errors="replace").splitlines()

    def _ending(self) -> str:
        status = self.exit_status
        assert status is not None, "it is still running"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _message(logged: re.Match[str] | None, line: str) -> str:
    """The message of a log line, without time and level."""
    if logged is None:
        return line
    return str(json.loads(logged["json"])) if logged["json"] else logged["text"]


def _kill_group(pid: int) -> None:
    """Kill a process group: its id is that of its first process, and it exists as long as any process in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
