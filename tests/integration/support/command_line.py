"""The tandem command as a person runs it: in a process of its own, with a state file and temporary files of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL

TANDEM = [sys.executable, "-m", "tandem.cli"]
STARTS_WITHIN_S = 60.0
"""Of processes that are started. Python's imports are most of it: a second with a core of its own, and many times that
where a dozen others want the core too. What is promised in seconds has a bound of its own where it is tested."""
SIMULATED = ["--engine", "simulated", "--model", str(DEMO_MODEL)]


def environment(state: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "TANDEM_STATE": str(state), "COLUMNS": "80", **more}


async def run(
    *command: str, state: Path, stdin: bytes | None = None, cwd: Path | None = None
) -> tuple[int | None, str, str]:
    """Exit status, standard output and standard error of a command."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(state),
        cwd=cwd,
    )
    out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def started(state: Path, *arguments: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A tandem command in the foreground of its own process, with all of its output on standard output."""
    process = await asyncio.create_subprocess_exec(
        *TANDEM,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(state, **env),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


def state_of(state: Path) -> dict[str, Any]:
    """What the state file says; empty while there is none."""
    try:
        found: dict[str, Any] = json.loads(state.read_text())
    except FileNotFoundError:
        return {}
    return found


async def wait_state(process: asyncio.subprocess.Process, state: Path, wanted: str) -> None:
    async def now() -> str | None:
        assert process.returncode is None, await process.stdout.read()  # type: ignore[union-attr]
        return state_of(state).get("state")

    await assert_eventually(
        now, lambda found: found == wanted, within_s=STARTS_WITHIN_S, what=f"a cluster that is {wanted}"
    )


@asynccontextmanager
async def cluster_up(state: Path, *options: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`tandem up` in the foreground of its own process, ready."""
    async with started(state, "up", *SIMULATED, *options, **env) as process:
        await wait_state(process, state, "serving")
        yield process


async def output_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.read()).decode()


async def line_with(process: asyncio.subprocess.Process, words: str) -> str:
    """The next line of its output that has these words."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(STARTS_WITHIN_S):
            while line := (await process.stdout.readline()).decode():
                if words in line:
                    return line.rstrip("\n")
    except TimeoutError:
        raise AssertionError(f"it did not say {words!r} within {STARTS_WITHIN_S} s") from None
    raise AssertionError(f"it ended without saying {words!r}")


def children_of(process: asyncio.subprocess.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; empty when it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def child_of(process: asyncio.subprocess.Process, module: str) -> psutil.Process:
    return next(child for child in psutil.Process(process.pid).children() if module in words_of(child))


async def gone(children: list[psutil.Process], within_s: float) -> None:
    """Wait until none of them is left."""

    async def left() -> list[str]:
        return [str(c) for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]

    await assert_eventually(left, lambda found: not found, within_s=within_s, what="the end of every process")


async def took_s(process: asyncio.subprocess.Process, act: Callable[[], None]) -> float:
    """Seconds from an act to the end of the process."""
    begin_s = time.monotonic()
    act()
    await process.wait()
    return time.monotonic() - begin_s
