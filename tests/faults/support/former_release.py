"""Processes of the former release in a cluster of this one, and their upgrade, one by one.

Owns which release a process runs. The former release runs with the libraries of this one: what a change of a library
breaks is not seen here.
"""

from __future__ import annotations

import lzma
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from tandem.local_cluster.child_process import ClusterProcess
from tests.faults.support.fault_cluster import FaultCluster, Plan
from tests.faults.support.history import now_s

RELEASES = Path(__file__).parents[1] / "releases"
SOURCES = ("src", *(f"services/{name}" for name in ("registry", "frontend", "prefill", "decode", "edge")))
"""Where the packages of a release are, in its checkout."""
HEALTH_INTERVAL_S = 0.2


def unpacked(directory: Path) -> Path:
    """The checkout of the former release, made in that directory."""
    [file] = RELEASES.glob("tandem-*.tar.xz")
    with lzma.open(file) as packed, tarfile.open(fileobj=packed) as source:
        # Every file as it is: the archive is our own.
        source.extraction_filter = lambda member, path: member
        source.extractall(directory)
    return directory


def path_of(checkout: Path) -> str:
    """PYTHONPATH of processes of a release."""
    return os.pathsep.join(str(checkout / source) for source in SOURCES)


def imported_from(path: str) -> Path:
    """Where a process with that PYTHONPATH has its code from: the proof that it runs another release."""
    code = "import tandem, tandem_decode, tandem_frontend, tandem_registry; print(tandem.__file__)"
    environment = {**os.environ, "PYTHONPATH": path}
    return Path(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip())


class MixedCluster(FaultCluster):
    """A cluster of the former release behind an edge; `upgrade` and `downgrade` restart a process with another."""

    def __init__(self, plan: Plan, logs: Path, stack: AsyncExitStack, former: Path) -> None:
        super().__init__(plan, logs, stack)
        self.former_path = path_of(former)

    @property
    def edge(self) -> ClusterProcess:
        return self.processes["edge"]

    def environment(self, name: str) -> dict[str, str]:
        return {"PYTHONPATH": self.former_path}

    async def start(self) -> None:
        await super().start()
        flags = {"registry": self.registries[0].address, "health-interval-s": str(HEALTH_INTERVAL_S)}
        await self.add("edge", "edge", flags)

    def is_former(self, process: ClusterProcess) -> bool:
        """Whether a running process was started as one of the former release."""
        return psutil.Process(process.pid).environ().get("PYTHONPATH") == self.former_path

    async def replace(self, process: ClusterProcess, *, with_former: bool = False) -> float:
        """Drain a process and start it with the other release; returns when it was ready."""
        assert self.is_former(process) is not with_former
        process.signal(signal.SIGTERM)
        status = await process.wait_ended()
        assert status == 0, f"{process.name} ended with {status}: {process.last_words()}"
        process.secrets = self.environment(process.name) if with_former else {}
        await self.restart(process.name)
        assert self.is_former(process) is with_former
        return now_s()

    def in_order(self, roles: Sequence[str]) -> list[ClusterProcess]:
        """All processes but the edge, by their roles."""
        return [process for role in roles for process in self.of_role(role)]


@asynccontextmanager
async def mixed_cluster(logs: Path, former: Path) -> AsyncIterator[MixedCluster]:
    """Two frontends and two pairs of the former release behind an edge, as long as the block."""
    async with AsyncExitStack() as stack:
        cluster = MixedCluster(Plan(registries=1), logs, stack, former)
        await cluster.start()
        yield cluster
