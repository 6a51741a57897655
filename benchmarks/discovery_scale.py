"""Cost of discovery with many workers: `python -m benchmarks.discovery_scale --backend consul`.

Starts one registry process, real registrations of workers without engines (in a few processes, each worker with its own
port), and frontends' watches, each in its own process. Prints how long a new frontend takes to learn of all workers,
how long a change takes to reach all frontends, and the CPU use of the registry. `--workers` takes several numbers, to
show the growth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem.local_cluster.cluster import ClusterProcess
from tandem.local_cluster.consul_binary import find_consul
from tests.integration.support.consul_host import consul_servers

HOSTS = 4
"""Processes that hold the workers."""
LINE_BYTES_MAX = 16 * 2**20


class Child:
    """A process of `benchmarks.discovery_fleet`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process
        self._turn = asyncio.Lock()

    async def do(self, command: str, argument: object = "") -> Any:
        """Its answer to a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(f"{command} {argument}\n".encode())
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child process exited during command {command!r}")
        return json.loads(line)


@asynccontextmanager
async def child(kind: str, registry: str, *arguments: object) -> AsyncIterator[Child]:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "benchmarks.discovery_fleet", kind, registry, *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=LINE_BYTES_MAX)
    try:
        yield Child(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def registry_process(
    logs: Path, arguments: argparse.Namespace
) -> AsyncIterator[tuple[ClusterProcess, int | None]]:
    """The registry, and the process id of the Consul agent under it."""
    flags = {"port": "0", "lease-ttl-s": str(arguments.lease_ttl_s), "drain-settle-s": "0"}
    async with AsyncExitStack() as stack:
        agent = None
        if arguments.backend == "consul":
            consul = await stack.enter_async_context(consul_servers(find_consul(), logs, 1))
            agent = consul.first.pid
            flags |= {"backend": "consul", "consul-address": consul.address}
        registry = ClusterProcess("registry", "registry", flags, logs)
        await registry.start(logs)
        stack.push_async_callback(registry.stop)
        await registry.wait_ready()
        yield registry, agent


def processor_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def open_frontends(frontends: list[Child], count: int) -> dict[str, float]:
    """Milliseconds until a frontend knows every worker: one after the other, and all at the same moment."""
    alone = [(await frontend.do("open", count))["seconds"] for frontend in frontends]
    for frontend in frontends:
        await frontend.do("close")
    together = [answer["seconds"] for answer in await asyncio.gather(*(f.do("open", count) for f in frontends))]
    return {
        "alone_median": round(1e3 * statistics.median(alone)),
        "alone_most": round(1e3 * max(alone)),
        "all_at_once_most": round(1e3 * max(together)),
    }


async def change(
    hosts: list[Child], frontends: list[Child], count: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One change a second, in turn a worker that leaves and the same one that comes back; when all have seen it."""
    asked: list[tuple[str, str, float]] = []
    for frontend in frontends:
        await frontend.do("seen")
    clock = asyncio.get_running_loop()
    begin_s = clock.time()
    for number in range(int(arguments.seconds * arguments.changes_per_s)):
        what, name = ("leave", "come")[number % 2], f"worker-{number // 2 * 7 % count:05d}"
        host = hosts[int(name[-5:]) // -(-count // HOSTS)]
        asked.append((what, name, (await host.do(what, name))["asked_s"]))
        await asyncio.sleep(max(0.0, begin_s + (number + 1) / arguments.changes_per_s - clock.time()))
    await asyncio.sleep(2)
    seen: list[dict[tuple[str, str], list[float]]] = []
    for frontend in frontends:
        times: dict[tuple[str, str], list[float]] = {}
        for what, name, time_s in await frontend.do("seen"):
            times.setdefault((what, name), []).append(time_s)
        seen.append(times)
    return seen_by_all(asked, seen)


def seen_by_all(asked: list[tuple[str, str, float]], seen: list[dict[tuple[str, str], list[float]]]) -> dict[str, Any]:
    """Milliseconds from the moment a change was asked for to the moment the last frontend saw it."""
    delays: dict[str, list[float]] = {"come": [], "leave": []}
    missed = 0
    for what, name, asked_s in asked:
        firsts = [min((t for t in times.get((what, name), ()) if t >= asked_s), default=None) for times in seen]
        if None in firsts:
            missed += 1
        else:
            delays[what].append(1e3 * (max(firsts) - asked_s))  # type: ignore[type-var, operator]
    both = delays["come"] + delays["leave"]
    return {
        "changes": len(asked),
        "missed": missed,
        "median": round(statistics.median(both), 1),
        "most": round(max(both), 1),
        **{f"{what}_median": round(statistics.median(values), 1) for what, values in delays.items()},
    }


async def troubles(hosts: list[Child]) -> int:
    """Warnings of all registrations since the last time."""
    return sum(answer["warnings"] for answer in await asyncio.gather(*(host.do("trouble") for host in hosts)))


async def rest(pid: int, agent: int | None, seconds: float) -> tuple[float, float]:
    """Shares of a core that registry and agent use while nothing changes."""
    before = processor_s(pid), processor_s(agent)
    await asyncio.sleep(seconds)
    return tuple((processor_s(p) - b) / seconds for p, b in zip((pid, agent), before, strict=True))  # type: ignore[return-value]


async def measure(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    share = -(-count // HOSTS)
    async with AsyncExitStack() as stack:
        registry, agent = await stack.enter_async_context(registry_process(logs, arguments))
        spans = [(first, min(share, count - first)) for first in range(0, count, share)]
        hosts = [await stack.enter_async_context(child("workers", registry.address, *span)) for span in spans]
        frontends = [
            await stack.enter_async_context(child("frontend", registry.address)) for _ in range(arguments.frontends)
        ]
        at_once = max(1, arguments.at_once // len(hosts)) if arguments.at_once else ""
        start_before_s = processor_s(registry.pid)
        registered = await asyncio.gather(*(host.do("register", at_once) for host in hosts))
        start_s = processor_s(registry.pid) - start_before_s
        views = await open_frontends(frontends, count)
        stampede = await troubles(hosts)
        idle = await rest(registry.pid, agent, arguments.seconds / 2)
        before = processor_s(registry.pid), processor_s(agent)
        begin_s = asyncio.get_running_loop().time()
        changes = await change(hosts, frontends, count, arguments)
        took_s = asyncio.get_running_loop().time() - begin_s
        busy = [(processor_s(p) - b) / took_s for p, b in zip((registry.pid, agent), before, strict=True)]
        memory = {"registry": registry.pid, "agent": agent}
        return {
            "workers": count,
            "registered_within_s": round(max(answer["seconds"] for answer in registered), 1),
            "registry_processor_s_for_it": round(start_s, 2),
            "warnings_of_workers": {"at_start": stampede, "afterwards": await troubles(hosts)},
            "full_view_ms": views,
            "change_seen_by_all_ms": changes,
            "registry_core_share": {"no_change": round(idle[0], 3), "changes": round(busy[0], 3)},
            "agent_core_share": {"no_change": round(idle[1], 3), "changes": round(busy[1], 3)},
            "resident_mib": {
                name: round(psutil.Process(pid).memory_info().rss / 2**20) for name, pid in memory.items() if pid
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("memory", "consul"), default="memory")
    parser.add_argument("--workers", type=int, nargs="+", default=[1000])
    parser.add_argument("--at-once", type=int, default=0, help="workers that register at a time; 0: all of them")
    parser.add_argument("--frontends", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--changes-per-s", type=float, default=1)
    parser.add_argument("--lease-ttl-s", type=float, default=5)
    arguments = parser.parse_args()
    for count in arguments.workers:
        print(
            json.dumps({"backend": arguments.backend, **asyncio.run(measure(count, arguments))}, indent=2), flush=True
        )


if __name__ == "__main__":
    main()
