"""The start of a real engine, cut short: nothing of it is left, no process and no file, and no caller waits for it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tandem.engine.sglang import arguments
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.command_line import children_of, gone, started, took_s, words_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(300),
]

AT_ONCE_S = 6.0
"""Two seconds, and some more: imports hold Python's lock, and the machine may have other work."""


@asynccontextmanager
async def worker(temporary: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A decode worker that waits for a registry that is not there; killed at the end if need be."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tandem_decode", "--registry", "127.0.0.1:1", "--model", str(DEMO_MODEL)],
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until(process: asyncio.subprocess.Process, moment: str, temporary: Path) -> list[psutil.Process]:
    """The children at that moment of an engine's start."""

    async def now() -> list[psutil.Process]:
        return children_of(process)

    def has_come(children: list[psutil.Process]) -> bool:
        if moment == "importing":
            return bool(list(temporary.rglob("tandem-sglang-*")))
        return any("spawn_main" in " ".join(words_of(child)) for child in children)

    return await assert_eventually(now, has_come, within_s=120, what=moment)


async def shared_memory(children: list[psutil.Process]) -> Path:
    """The file in which the scheduler among them keeps its counters, once it is there."""

    def now() -> list[str]:
        maps = [Path(f"/proc/{child.pid}/maps").read_text() for child in children if words_of(child)]
        return re.findall(r"/dev/shm/sglang_loads_\S+", "\n".join(maps))

    return Path((await assert_eventually(now, bool, within_s=120, what="shared memory"))[0])


@pytest.mark.parametrize("moment", ["importing", "loading"])
async def test_a_worker_that_starts_ends_at_once(temporary: Path, moment: str) -> None:
    async with worker(temporary) as process:
        children = await until(process, moment, temporary)
        shared = await shared_memory(children) if moment == "loading" else None
        assert await took_s(process, process.terminate) < AT_ONCE_S
        assert process.returncode == 0
        await gone(children, 1)
    assert shared is None or not shared.exists()


async def test_a_killed_worker_leaves_no_process() -> None:
    """Killed before its child has asked the kernel for its parent's end."""
    directory = Path(tempfile.mkdtemp(prefix="t"))
    try:
        async with worker(directory) as process:
            children = await until(process, "loading", directory)
            process.kill()
            await process.wait()
            # It imports SGLang first.
            await gone(children, 90)
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_cluster_that_starts_ends_at_once(state: Path, temporary: Path, is_killed: bool) -> None:
    roles = ("--prefill", "0", "--decode", "0", "--aggregated", "1", "--no-edge", "--model", str(DEMO_MODEL))
    async with started(state, "up", *roles, TMPDIR=str(temporary)) as process:
        children = await until(process, "loading", temporary)
        assert await took_s(process, process.kill if is_killed else process.terminate) < AT_ONCE_S
        assert process.returncode == (-9 if is_killed else 130)
        await gone(children, AT_ONCE_S if is_killed else 1)


def test_the_names_of_arguments_are_those_of_sglang() -> None:
    names = arguments.read_names()
    assert {"chunked_prefill_size", "model_path", "enable_priority_scheduling"} <= names
    assert len(names) > 300
    assert "chunked_prefill" not in names
