"""The tools in environments of their own, the commands of the guide, and what they run against."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import REPOSITORY, SIMULATED, running
from tools.own_environment import own_environment, own_node_modules

GUIDE = REPOSITORY / "docs" / "guide" / "other-tools.md"
NAME = "other-tools"
WITHIN_S = 400
"""For one command: AIPerf starts seven processes, each of which imports for many seconds on two busy cores."""


def guide_blocks(language: str) -> list[str]:
    """The blocks of code of the guide, as a reader copies them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for found, text in blocks if found == language]


def guide_command(begin: str) -> str:
    """The command of the guide that begins so."""
    [found] = [block for block in guide_blocks("") if re.search(rf"^{re.escape(begin)}", block, re.MULTILINE)]
    return found


def had(install: Callable[[], Path], index: str, *ping: str) -> Path:
    """What `install` makes. Skips where it cannot because the index does not answer; another failure is one."""
    try:
        return install()
    except subprocess.CalledProcessError:
        if subprocess.run(ping, capture_output=True, check=False).returncode == 0:
            raise
        pytest.skip(f"the tools are not installed yet, and {index} cannot be reached")


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of the Python tools' programs."""
    ping = (sys.executable, "-m", "pip", "index", "versions", "pip", "--quiet")
    return had(lambda: own_environment(NAME, borrows=True), "the index of Python's packages", *ping)


@pytest.fixture(scope="session")
def agents() -> Path:
    """The folder of the agents' programs."""
    return had(lambda: own_node_modules(NAME), "the registry of npm", "npm", "ping") / "node_modules" / ".bin"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A simulated cluster with an edge."""
    logs = tmp_path_factory.mktemp("cluster")
    async with running(logs, engine="simulated", edge=True, worker_flags=SIMULATED) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory for what a tool writes, with the folders of a checkout that the commands name."""
    for name in ("models", "benchmarks", "src"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


async def run(command: str, folder: Path, programs: Path, **environment: str) -> str:
    """What a command of the shell prints. It sees nothing of this process's environment but PATH.

    Raises:
        AssertionError: it failed or took too long; with what it printed.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    # A path of its own, short enough for the sockets in it: AIPerf ends with status 0 and no report where it is longer.
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as temporary:
        settings = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), "TMPDIR": temporary}
        return await _run(command, folder, {**settings, **environment})


async def _run(command: str, folder: Path, environment: dict[str, str]) -> str:
    child = await asyncio.create_subprocess_exec(
        "bash", "-ec", command, cwd=folder, env=environment, start_new_session=True,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(WITHIN_S):
            printed, _ = await child.communicate()
    finally:
        if child.returncode is None:
            os.killpg(child.pid, 9)
            await child.wait()
    assert child.returncode == 0, printed.decode()[-8000:]
    return printed.decode()


def addressed(command: str, cluster: LocalCluster) -> str:
    """The command with the addresses of this cluster."""
    assert cluster.edge is not None
    return command.replace("127.0.0.1:8080", cluster.edge.address).replace("127.0.0.1:50051", cluster.frontend.address)
