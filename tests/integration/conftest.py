"""Clusters of real processes on loopback: a simulated one for breadth, SGLang ones for truth."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.tool_model import link_tool_model
from tests.integration.support import baseline

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"
SIMULATED = {"engine-extra": '{"decode_step_s": 0.004}'}


@asynccontextmanager
async def running(logs: Path, **spec: Any) -> AsyncIterator[LocalCluster]:
    """A cluster of the demo model, logging into the test's directory. Nothing of its requests is left in the end."""
    async with LocalCluster(ClusterSpec(model=DEMO_MODEL, log_directory=logs, **spec)) as cluster:
        before = await baseline.take(cluster)
        yield cluster
        await baseline.assert_back(cluster, before)


@pytest.fixture(scope="session", autouse=True)
def real_engine_is_there() -> None:
    """In CI, the absence of the real engine would hide everything that matters."""
    assert importlib.util.find_spec("sglang") is not None or not os.environ.get("CI")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def simulated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A pair of simulated workers with a frontend and a registry."""
    async with running(tmp_path_factory.mktemp("simulated"), engine="simulated", worker_flags=SIMULATED) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def http_pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A pair of SGLang engines behind a real Envoy; shared by all tests that speak HTTP to the real engine. It loads
    adapters from its `adapter-root`.
    """
    folder = tmp_path_factory.mktemp("http")
    flags = {"dtype": "float32", "adapter-root": str(folder / "adapters")}
    async with running(folder, edge=True, worker_flags=flags) as cluster:
        yield cluster


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state file of the test's own, not there yet."""
    return tmp_path / "state" / "cluster.json"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary files, with a path short enough for sockets; empty at the end of the test."""
    directory = Path(tempfile.mkdtemp(prefix="t"))
    yield directory
    left = [path.name for path in directory.iterdir()]
    shutil.rmtree(directory)
    assert not left


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tool_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """One aggregated engine of a model whose template takes tools, behind a frontend with parsers and an Envoy."""
    folder = tmp_path_factory.mktemp("tools")
    spec = ClusterSpec(
        model=link_tool_model(folder / "tool-model", DEMO_MODEL),
        log_directory=folder,
        prefill=0,
        decode=0,
        aggregated=1,
        edge=True,
        worker_flags={"dtype": "float32"},
        role_flags={"frontend": {"tool-parser": "qwen25", "reasoning-parser": "qwen3"}},
    )
    async with LocalCluster(spec) as cluster:
        yield cluster
