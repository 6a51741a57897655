"""CPU and memory use of an idle cluster: `python -m benchmarks.idle`.

Starts a cluster with the real engine, runs some requests, waits until it is idle, and then sums the CPU time of all its
processes (children included) for a while. Prints it in percent of one core, and the memory of each service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
from pathlib import Path

import psutil

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster

MODEL = Path("models") / "tandem-demo"
REST_S = 5


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def processor_s(pid: int) -> float:
    total_s = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def memory_mib(pid: int) -> float:
    return sum(process.memory_full_info().uss for process in family(pid)) / 2**20


async def measure(seconds: float, requests: int) -> None:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    async with LocalCluster(ClusterSpec(model=MODEL, log_directory=logs)) as cluster:
        for _ in range(requests):
            request = pb.GenerateRequest(prompt="Once upon a time", stopping={"max_tokens": 20})
            async for _ in calls.generate(cluster.frontend.address, request):
                pass
        await asyncio.sleep(REST_S)
        before = {process.name: processor_s(process.pid) for process in cluster.processes}
        await asyncio.sleep(seconds)
        percent = {p.name: 100 * (processor_s(p.pid) - before[p.name]) / seconds for p in cluster.processes}
        rss = {p.name: psutil.Process(p.pid).memory_info().rss / 2**20 for p in (cluster.frontend, cluster.registry)}
        unique = {process.name: memory_mib(process.pid) for process in cluster.processes}
    print(json.dumps({
        "seconds": seconds,
        "percent_of_one_core": {"all": round(sum(percent.values()), 2), **{n: round(v, 2) for n, v in percent.items()}},
        "resident_mib": {name: round(value) for name, value in rss.items()},
        "unique_mib_with_children": {name: round(value) for name, value in unique.items()},
    }, indent=2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.seconds, arguments.requests))


if __name__ == "__main__":
    main()
