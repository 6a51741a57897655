"""The child processes of a measurement: start, pipes, logs, end.

Owns every process until it has ended. `systems` defines which processes to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.lines import LINE_BYTES_MAX

HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 8.0
POLL_S = 0.03


class StartError(Exception):
    """A process did not start; says which and why."""


def _end_with_parent() -> None:
    """In the child: whatever happens to the benchmark, nothing of it stays."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def free_port() -> int:
    """A port that is free now, for programs that must be given one."""
    with socket.socket() as any_socket:
        any_socket.bind((HOST, 0))
        return int(any_socket.getsockname()[1])


def _announced(file: Path) -> str | None:
    """The address in a file that a service writes once it serves."""
    return str(json.loads(file.read_text())["address"]) if file.exists() else None


class Program:
    """A process with a log and a group of its own."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = list(command)
        self._log = log / f"{name}.log"
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        """It, once started."""
        assert self._process is not None, "before start()"
        return self._process

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self.process.pid

    async def start(self, *, pipes: bool = False) -> None:
        """Start it; with `pipes` its standard input and output are the benchmark's."""
        pipe = asyncio.subprocess.PIPE
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=pipe if pipes else asyncio.subprocess.DEVNULL,
                stdout=pipe if pipes else log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                # The benchmark has one thread.
                preexec_fn=_end_with_parent,
                limit=LINE_BYTES_MAX,
            )

    async def wait_announced(self, file: Path) -> str:
        """The address in the file that a service of Tandem writes when it serves.

        Raises:
            StartError: it ended first, or takes too long.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while (address := _announced(file)) is None:
                    self.check_runs()
                    await asyncio.sleep(POLL_S)
                return address
        raise StartError(f"{self.name} was not ready after {START_TIMEOUT_S:g} s: {self.last_words()}")

    def check_runs(self) -> None:
        """Raise StartError if it has ended."""
        if self.process.returncode is not None:
            raise StartError(f"{self.name} exited with status {self.process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return " | ".join(lines[-3:]) or "it said nothing"

    async def stop(self) -> None:
        """End it, and everything in its group."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


@contextlib.asynccontextmanager
async def running(program: Program, *, pipes: bool = False) -> AsyncIterator[Program]:
    """A program for as long as the block lasts."""
    await program.start(pipes=pipes)
    try:
        yield program
    finally:
        await program.stop()


class Helper:
    """A child of this package that answers questions over its pipes."""

    def __init__(self, name: str, module: str, log: Path, python: Path, paths: Sequence[Path]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._program = Program(name, [str(python), "-m", module], log, environment)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._program.pid

    async def start(self, options: dict[str, Any]) -> dict[str, Any]:
        """Start it with its options. Returns its first line.

        Raises:
            StartError: it did not get so far.
        """
        await self._program.start(pipes=True)
        return await self.ask(options)

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question and its answer."""
        process = self._program.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            self._program.check_runs()
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        """End it."""
        await self._program.stop()


def own_python() -> Path:
    """The interpreter that this process runs in."""
    return Path(sys.executable)
