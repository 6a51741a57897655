"""How the commands end on a signal: at once before they serve, draining after, with nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tandem.testing.eventually import assert_eventually
from tests.integration.support.command_line import (
    SIMULATED,
    TANDEM,
    child_of,
    children_of,
    cluster_up,
    environment,
    gone,
    line_with,
    output_of,
    started,
    state_of,
    took_s,
    wait_state,
    words_of,
)

pytestmark = pytest.mark.timeout(60)

AT_ONCE_S = 4.0
"""Two seconds, and as much again for a machine that has other work."""
SLOW = ["--engine-extra", '{"decode_step_s": 0.05}']


async def some_children(process: asyncio.subprocess.Process, module: str) -> list[psutil.Process]:
    """The children, once one of that module is among them."""

    async def now() -> list[psutil.Process]:
        return children_of(process)

    def is_there(children: list[psutil.Process]) -> bool:
        return any(module in words_of(child) for child in children)

    return await assert_eventually(now, is_there, within_s=20, what=module)


@pytest.mark.parametrize("command", ["up", "demo"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_start_is_given_up_at_once(state: Path, temporary: Path, command: str, number: signal.Signals) -> None:
    async with started(state, command, *SIMULATED, TMPDIR=str(temporary)) as process:
        children = await some_children(process, "tandem_decode")
        assert await took_s(process, lambda: process.send_signal(number)) < AT_ONCE_S
        assert process.returncode == 130
        assert "stopping (Ctrl-C again to end at once)" in await output_of(process)
        await gone(children, 1)
    assert not state.exists()


async def test_a_second_signal_ends_a_start_without_waiting(state: Path, temporary: Path) -> None:
    async with started(state, "up", *SIMULATED, TMPDIR=str(temporary)) as process:
        children = await some_children(process, "tandem_decode")
        # One that cannot react: only the second signal can be what ends it.
        child_of(process, "tandem_registry").suspend()
        process.send_signal(signal.SIGINT)
        await line_with(process, "stopping")
        assert await took_s(process, lambda: process.send_signal(signal.SIGINT)) < 1.5
        assert process.returncode == 130
        await gone(children, 2)
    assert not state.exists()


async def test_a_second_signal_cuts_a_drain_short(state: Path, temporary: Path) -> None:
    async with cluster_up(state, *SLOW, TMPDIR=str(temporary)) as process:
        generation = await asyncio.create_subprocess_exec(
            *TANDEM,
            *["generate", "x", "--plain", "--json", "--max-tokens", "2000"],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment(state),
        )
        assert generation.stdout is not None
        await generation.stdout.readline()
        children = children_of(process)
        process.send_signal(signal.SIGINT)
        await line_with(process, "draining")
        assert await took_s(process, lambda: process.send_signal(signal.SIGINT)) < AT_ONCE_S
        assert process.returncode == 70
        await gone(children, 2)
        await generation.communicate()
        assert generation.returncode == 1
    assert not state.exists()


@pytest.mark.parametrize("phase", ["starting", "serving"])
async def test_a_killed_parent_leaves_nothing(state: Path, temporary: Path, phase: str) -> None:
    async with started(state, "up", *SIMULATED, TMPDIR=str(temporary)) as process:
        await wait_state(process, state, phase)
        children = await some_children(process, "tandem_registry" if phase == "starting" else "tandem_edge")
        process.kill()
        await process.wait()
        await gone(children, AT_ONCE_S)

    async def left() -> list[str]:
        return os.listdir(temporary)

    await assert_eventually(left, lambda found: not found, within_s=2, what="an empty directory for temporary files")


async def test_the_newest_logs_are_kept_beside_the_state(state: Path, temporary: Path) -> None:
    logs = state.parent / "logs"
    old = [logs / f"2020010{day}-000000-1" for day in range(1, 8)]
    for directory in (*old, logs / "mine"):
        directory.mkdir(parents=True)
    async with cluster_up(state, "--no-edge", TMPDIR=str(temporary)):
        mine = Path(state_of(state)["log"])
        assert (mine / "decode-0.log").exists()
    assert sorted(logs.iterdir()) == [*old[-4:], mine, logs / "mine"]


async def test_a_read_only_place_still_has_logs(state: Path) -> None:
    state.parent.mkdir()
    (state.parent / "logs").write_text("not a directory")
    async with cluster_up(state, "--no-edge"):
        assert (Path(state_of(state)["log"]) / "decode-0.log").exists()


@pytest.mark.parametrize(
    "command", [[*TANDEM, "status"], [sys.executable, "-m", "tandem_frontend", "--registry", "127.0.0.1:1"]]
)
async def test_an_interrupt_while_modules_are_imported_is_silent(state: Path, command: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(state)
    )

    async def catches_sigterm() -> bool:
        """The kernel's own account. It does so from the first line of a program on, and long before it serves."""
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    await assert_eventually(catches_sigterm, bool, within_s=10, what="a handler")
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 130
    assert (out, err) == (b"", b"")


async def test_a_worker_without_a_registry_ends_at_once(state: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tandem_decode", "--registry", "127.0.0.1:1", *SIMULATED],
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b"retrying until it responds" not in await process.stderr.readline():
        pass
    assert await took_s(process, process.terminate) < AT_ONCE_S
    assert process.returncode == 0


async def test_a_start_that_cannot_be_undone_goes_with_the_process() -> None:
    """What an engine's imports do: neither start nor stop end, and there is a child."""
    program = """
import asyncio, subprocess, sys
from tandem.service import process
class Stuck:
    async def __aenter__(self):
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    async def __aexit__(self, *exception):
        await asyncio.sleep(60)
process.leave(asyncio.run(process.serve(Stuck())))
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    child = psutil.Process(int(await process.stdout.readline()))
    assert await took_s(process, process.terminate) < AT_ONCE_S
    assert process.returncode == 0
    await gone([child], 1)
