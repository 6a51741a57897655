"""What holds for every test: nothing it started is left behind."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import pytest_asyncio

from tandem.errors import StartError
from tandem.local_cluster.consul_binary import find_consul
from tandem.local_cluster.debian import find_program
from tests.scheduling import SharedEngines, order
from tests.unit.support.examples import examples
from tools.prometheus_binary import PROMETHEUS, PROMTOOL
from tools.rerun_failed import ENDED

# A child that is tied to its parent runs a little Python before its program begins; with gRPC's handlers of forks,
# which no test needs, it can die of that while calls are running.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# How long one example takes says how busy the machine is; no test here is about that.
hypothesis.settings.register_profile(
    "tandem",
    deadline=None,
    max_examples=examples(100),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tandem")

KEPT_THREADS = ("asyncio_", "grpc", "ThreadPoolExecutor", "pytest_timeout", "Thread-")
"""Pools that live as long as the process, whichever test used them first."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        (session.config.rootpath / ENDED).unlink(missing_ok=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Say how the run ended, for a second run of what failed (`make test-again`)."""
    ended = session.config.rootpath / ENDED
    if not os.environ.get("PYTEST_XDIST_WORKER") and ended.parents[1].is_dir():
        ended.parent.mkdir(exist_ok=True)
        ended.write_text(str(int(exitstatus)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile, files that share engines go to one process; `pytest_collection_modifyitems` orders them."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return SharedEngines(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        order(items)


@pytest.fixture(autouse=True)
def no_task_is_left(request: pytest.FixtureRequest) -> None:
    """Only a test with an event loop can leave a task; a loop for each of the others costs more than most of them."""
    if pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("tasks_end")


@pytest_asyncio.fixture
async def tasks_end() -> AsyncIterator[None]:
    """A task that outlives its test has no owner."""
    before = asyncio.all_tasks()
    yield
    for _ in range(20):
        left = [task for task in asyncio.all_tasks() - before if not task.done() and task is not asyncio.current_task()]
        if not left:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"tasks left behind: {[task.get_coro() for task in left]}")


@pytest.fixture(autouse=True, scope="session")
def no_process_is_left() -> Iterator[None]:
    """Every process a test started has ended with it."""
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    # Multiprocessing's own helper ends with its parent.
    left = [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]
    assert not left, f"processes left behind: {[' '.join(child.cmdline())[:200] for child in left]}"


@pytest.fixture(autouse=True, scope="session")
def no_thread_is_left() -> Iterator[None]:
    """Threads other than the pools' are joined by the test that started them."""
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if not t.daemon and not t.name.startswith(KEPT_THREADS)]
    assert not left, f"threads left behind: {left}"


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    """Consul's binary, fetched when there is none. Where it cannot be had a test is skipped; in CI it fails."""
    return _had(lambda: find_consul(report=print))


@pytest.fixture(scope="session")
def prometheus_binary() -> Path:
    """Prometheus's, in the same way."""
    return _had(lambda: find_program(PROMETHEUS, report=print))


@pytest.fixture(scope="session")
def promtool() -> Path:
    """The tool that comes with it."""
    return _had(lambda: find_program(PROMTOOL, report=print))


def _had(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except StartError as problem:
        if os.environ.get("CI"):
            pytest.fail(str(problem))
        pytest.skip(str(problem))
