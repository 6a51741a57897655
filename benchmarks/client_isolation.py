"""A well-behaved client beside one that asks for too much: `python -m benchmarks.client_isolation`.

Starts a simulated pair, a frontend and an edge with two keys, and runs each attack of
`tests/integration/support/attacks.py` against it from another process, while a client sends a short chat every 0.2 s.
Prints the client's latency before and beside each attack, and the resident memory of every process: before it, the most
during it, and some time after its end. All attacks run against the same processes; `--rounds 2` repeats them, and shows
whether a process keeps something each time, or once. `--edge-only` puts the edge before a stand-in of a frontend in
this process, and asks it for the smallest call: what the edge alone delays and keeps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tests.integration.support.attacks import ATTACKS, CHAT, Target, attacking
from tests.integration.support.edge_host import edge, stub_frontend

MODEL = Path("models") / "tandem-demo"
ENGINE = '{"decode_step_s": 0.004}'
ATTACKER_KEY, CLIENT_KEY = "sk-attacker-0123456789abcdef", "sk-client-0123456789abcdef"
PERIOD_S = 0.2
SAMPLE_S = 0.25
FIRST_S = 1.0
"""The edge lets the requests of one second through at once."""
MIB = 2**20


@dataclass
class Latencies:
    """What a client met."""

    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    """The longest of the requests of the first `FIRST_S`."""
    outcomes: Counter[str] = field(default_factory=Counter)

    def quantile_s(self, share: float) -> float:
        """The latency that so many of the requests did not exceed."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class Client:
    """A well-behaved one."""

    http: httpx.AsyncClient
    path: str
    body: Mapping[str, Any]

    async def ask(self, seconds: float) -> Latencies:
        """A request every `PERIOD_S`, without waiting for the one before; returns when all have ended."""
        return await ask(self.http, self.path, self.body, seconds)


async def ask(http: httpx.AsyncClient, path: str, body: Mapping[str, Any], seconds: float) -> Latencies:
    """See `Client.ask`."""
    found, tasks, end_s = Latencies(), list[asyncio.Task[None]](), time.monotonic() + seconds

    async def one() -> None:
        begin_s = time.monotonic()
        try:
            response = await http.post(path, json=body)
            outcome = str(response.status_code) if "error" not in response.text else "error in the stream"
        except httpx.HTTPError as problem:
            outcome = type(problem).__name__
        found.outcomes[outcome] += 1
        found.seconds.append(time.monotonic() - begin_s)
        if begin_s < end_s - seconds + FIRST_S:
            found.first_s = max(found.first_s, found.seconds[-1])

    while time.monotonic() < end_s:
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(PERIOD_S)
    await asyncio.gather(*tasks)
    return found


def resident_mib(process: psutil.Process) -> float:
    """Resident memory of a process and its children; shared pages count in each."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total / MIB


class Memory:
    """The memory of every process of the cluster."""

    def __init__(self, processes: Iterable[ClusterProcess]) -> None:
        self._processes = {process.name: psutil.Process(process.pid) for process in processes}
        self.names = tuple(self._processes)

    def now(self) -> dict[str, float]:
        """MiB by process."""
        return {name: resident_mib(process) for name, process in self._processes.items()}

    @asynccontextmanager
    async def most(self) -> AsyncIterator[dict[str, float]]:
        """The most MiB by process while the block runs."""
        most = self.now()

        async def sample() -> None:
            while True:
                await asyncio.sleep(SAMPLE_S)
                for name, value in self.now().items():
                    most[name] = max(most[name], value)

        sampling = asyncio.create_task(sample())
        try:
            yield most
        finally:
            sampling.cancel()


@dataclass
class Row:
    """One attack."""

    name: str
    quiet: Latencies
    beside: Latencies
    before: dict[str, float]
    most: dict[str, float]
    after: dict[str, float]
    load: float
    """Load average of the machine at its end."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and for how long."""

    client: Client
    memory: Memory
    target: Target
    quiet_s: float
    attack_s: float
    after_s: float
    begin_late_s: float

    async def row(self, name: str) -> Row:
        """Run one attack."""
        quiet = await self.client.ask(self.quiet_s)
        before = self.memory.now()
        async with self.memory.most() as most, attacking(name, self.target):
            await asyncio.sleep(self.begin_late_s)
            beside = await self.client.ask(self.attack_s)
        await asyncio.sleep(self.after_s)
        return Row(name, quiet, beside, before, most, self.memory.now(), os.getloadavg()[0])


def latency_table(rows: list[Row]) -> str:
    """Markdown."""
    heads = [
        "attack", "requests", "not answered", "quiet p50, p99 ms", "beside it p50, p99 ms", "p99 ratio",
        "longest of the first second, ms", "load",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        quiet, beside = ([1e3 * each.quantile_s(share) for share in (0.5, 0.99)] for each in (row.quiet, row.beside))
        total, failed = row.beside.outcomes.total(), row.beside.outcomes.total() - row.beside.outcomes["200"]
        cells = f"{quiet[0]:.0f}, {quiet[1]:.0f} | {beside[0]:.0f}, {beside[1]:.0f} | {beside[1] / quiet[1]:.1f}"
        lines.append(f"| {row.name} | {total} | {failed} | {cells} | {1e3 * row.beside.first_s:.0f} | {row.load:.1f} |")
    return "\n".join(lines)


def memory_table(rows: list[Row], names: tuple[str, ...]) -> str:
    """Markdown: MiB before, the most during, and after each attack."""
    lines = [f"| attack | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in rows:
        cells = (f"{row.before[name]:.0f}, {row.most[name]:.0f}, {row.after[name]:.0f}" for name in names)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def measure(given: argparse.Namespace) -> tuple[list[Row], tuple[str, ...]]:
    """Run all attacks on one cluster."""
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    keys = logs / "keys"
    keys.write_text(f"attacker: {ATTACKER_KEY}\nclient: {CLIENT_KEY}\n")
    keys.chmod(0o600)
    async with AsyncExitStack() as stack:
        cluster = tuple[ClusterProcess, ...]()
        if given.edge_only:
            _, frontend = await stack.enter_async_context(stub_frontend())
            path, body = "/v1/detokenize", dict[str, Any](token_ids=[1])
        else:
            spec = ClusterSpec(
                model=MODEL, log_directory=logs, engine="simulated", edge=False, worker_flags={"engine-extra": ENGINE}
            )
            started = await stack.enter_async_context(LocalCluster(spec))
            cluster, frontend = tuple(started.processes), started.frontend.address
            path, body = "/v1/chat/completions", CHAT
        flags = {"api_keys": keys, "drain_timeout_s": 1, **dict(given.edge_flag)}
        door = await stack.enter_async_context(edge(logs, frontend, **flags))
        url, headers = f"http://{door.address}", {"authorization": f"Bearer {CLIENT_KEY}"}
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, timeout=30))
        client, memory = Client(http, path, body), Memory((*cluster, door))
        await client.ask(3)  # nothing of a first request is measured
        target = Target(url, frontend, ATTACKER_KEY)
        bench = Bench(client, memory, target, given.quiet_s, given.attack_s, given.after_s, given.begin_late_s)
        rows = list[Row]()
        for name in given.attacks * given.rounds:
            rows.append(await bench.row(name))
            print(memory_table(rows[-1:], memory.names).splitlines()[-1], file=sys.stderr, flush=True)
    return rows, memory.names


def main() -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=list(ATTACKS), help="names, by commas")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quiet-s", type=float, default=5)
    parser.add_argument("--attack-s", type=float, default=10)
    parser.add_argument("--after-s", type=float, default=30, help="pause before the memory after an attack is read")
    parser.add_argument("--begin-late-s", type=float, default=0, help="how long the attack runs before the client")
    parser.add_argument(
        "--edge-flag", action="append", default=[], type=lambda text: text.split("=", 1), metavar="NAME=VALUE"
    )
    parser.add_argument("--edge-only", action="store_true", help="a stand-in answers; only resets and idle connections")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows, names = asyncio.run(measure(given))
    if given.json:
        print(json.dumps([{
            "attack": row.name, "quiet_s": sorted(row.quiet.seconds), "beside_s": sorted(row.beside.seconds),
            "outcomes": row.beside.outcomes, "before_mib": row.before, "most_mib": row.most, "after_mib": row.after,
        } for row in rows]))  # fmt: skip
    else:
        print(f"{latency_table(rows)}\n\nMiB before, the most during, and after:\n\n{memory_table(rows, names)}")


if __name__ == "__main__":
    main()
