"""Nothing is left of a test's requests: each process of a cluster is compared with itself from before them.

Judges only processes that are the same ones at the end and can be asked; one that a test killed has no baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.client import calls
from tandem.errors import ServiceError
from tandem.local_cluster.child_process import ClusterProcess, ProcessState
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually

SLACK = {"open_calls": 3, "tasks": 12, "threads": 6, "descriptors": 12}
"""Streams between the processes themselves, which may come only after the first look, with their tasks and sockets. A
leak of one for each request is far more in any test of dozens."""
FOR_EACH_PROCESS = {"open_calls": 2, "tasks": 6, "descriptors": 3}
"""More on a registry: when another one is gone, all others come to it."""
WORKERS = ("prefill", "decode", "aggregated")
WITHIN_S = 5.0


@dataclass(frozen=True)
class Baseline:
    """What each process held, by pid."""

    counts: dict[int, dict[str, int]]


async def take(cluster: LocalCluster) -> Baseline:
    """Look at every process."""
    return Baseline({process.pid: await _counts(process) for process in _askable(cluster)})


async def assert_back(cluster: LocalCluster, baseline: Baseline) -> None:
    """Wait until every process is back where it was."""
    for process in _askable(cluster):
        if process.pid in baseline.counts:
            before = baseline.counts[process.pid]
            if process.role == "registry":
                count = len(cluster.processes)
                before = {name: most + count * FOR_EACH_PROCESS.get(name, 0) for name, most in before.items()}

            async def grown(process: ClusterProcess = process, before: dict[str, int] = before) -> dict[str, int]:
                if process not in _askable(cluster):
                    return {}
                try:
                    now = await _counts(process)
                except ServiceError as problem:
                    # Killed on purpose, and the cluster has not seen its end yet.
                    raise AssertionError(f"{process.name} does not answer: {problem}") from None
                return {name: now[name] for name, most in _bounds(before).items() if now[name] > most}

            what = f"{process.name} as before ({before})"
            await assert_eventually(grown, lambda more: not more, within_s=WITHIN_S, every_s=0.1, what=what)


def _bounds(before: dict[str, int]) -> dict[str, int]:
    return {name: before[name] + SLACK.get(name, 0) for name in before}


async def _counts(process: ClusterProcess) -> dict[str, int]:
    response = await calls.process_figures(process.address)
    counts = {name: getattr(response, name) for name in SLACK}
    if process.role in WORKERS:
        load = await calls.worker_load(process.address)
        counts |= {"open_legs": load.open_legs, "running_requests": load.running_requests}
        counts |= {"waiting_requests": load.waiting_requests, "transferring_requests": load.transferring_requests}
    return counts


def _askable(cluster: LocalCluster) -> list[ClusterProcess]:
    if cluster.spec.tls is not None:
        return []
    known = [p for p in cluster.processes if p.role in (*WORKERS, "frontend", "registry")]
    return [process for process in known if process.runs and process.state is ProcessState.READY]
