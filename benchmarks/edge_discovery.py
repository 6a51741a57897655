"""Two ways for the edge to discover frontends, side by side: `python -m benchmarks.edge_discovery`.

Starts real frontends, a registry on a Consul agent, and two edges in front of the same frontends: one watches the
registry, the other queries Consul's DNS over TCP. The registry registers each frontend in Consul, for both. Both edges
are under the same steady load while frontends join, drain and are killed, and while Consul (losing its data) and the
registry are killed and restarted. Prints the failed requests of each edge's clients.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from tandem.discovery.watches import FrontendWatch
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.consul_agent import AgentPorts, AgentSpec, ConsulAgent
from tandem.local_cluster.consul_binary import find_consul
from tandem.service import run_directory

MODEL = Path("models") / "tandem-demo"
NAME = "frontend.tandem.service.consul"
HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
CLIENTS = 4
PAUSE_S = 0.01
LEASE_S = 2.0
SETTLE_S = 2.0
OUTAGE_S = 3.0
STEPS = ("join", "drain", "kill", "registry_killed", "consul_killed")


@dataclass
class Load:
    """Clients of one edge that ask again and again; when each request failed."""

    edge: ClusterProcess
    answered: int = 0
    failed_s: list[float] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "Once", "stopping": {"max_tokens": 4}}
        while True:
            try:
                ok = (await client.post("/v1/generate:unary", json=body)).status_code == 200
            except httpx.HTTPError:
                ok = False
            if ok:
                self.answered += 1
            else:
                self.failed_s.append(time.time())
            await asyncio.sleep(PAUSE_S)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with httpx.AsyncClient(base_url=f"http://{self.edge.address}", timeout=20) as client:
            self.tasks = [asyncio.create_task(self.ask(client)) for _ in range(CLIENTS)]
            yield
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks)

    def failures(self, since_s: float) -> dict[str, float]:
        after = [at_s - since_s for at_s in self.failed_s if at_s >= since_s]
        return {"failed": len(after), "last_failed_ms": round(1e3 * max(after, default=0.0))}

    def requests_s(self, frontend: str, since_s: float) -> list[float]:
        """Times since then at which requests began that this edge sent to a frontend."""
        found = []
        for line in self.edge.log.read_text().splitlines():
            if f'"frontend":"{frontend}"' in line and line.startswith("{"):
                at_s = datetime.fromisoformat(json.loads(line)["time"]).timestamp()
                if at_s >= since_s - 0.001:
                    found.append(max(0.0, at_s - since_s))
        return found


class Bench:
    """All processes, and the two loads."""

    def __init__(self, logs: Path, run: Path) -> None:
        self.logs, self.run = logs, run
        self.consul = ConsulAgent(find_consul(report=print), logs, AgentSpec(in_memory=True))
        self.port = AgentPorts.draw().server
        kept = {"backend": "consul", "consul-address": self.consul.access.address.removeprefix("http://")}
        self.registry = ClusterProcess("registry", "registry", {"port": "0", "lease-ttl-s": str(LEASE_S), **kept}, logs)
        self.processes: list[ClusterProcess] = []
        self.frontends: dict[str, ClusterProcess] = {}
        self.loads: dict[str, Load] = {}
        self.watch: FrontendWatch | None = None

    async def start(self, process: ClusterProcess) -> ClusterProcess:
        if process not in self.processes:
            self.processes.append(process)
        await process.start(self.run)
        await process.wait_ready()
        if process is self.registry:
            process.flags["port"] = process.address.rpartition(":")[2]
        return process

    async def up(self) -> None:
        await self.start(self.consul)
        await self.start(self.registry)
        common = {"registry": self.registry.address, "model": str(MODEL), "drain-settle-s": "0.5"}
        worker = {**common, "engine": "simulated", "role": "aggregated", "worker-id": "aggregated-0"}
        await self.start(ClusterProcess("aggregated-0", "aggregated", worker, self.logs))
        self.watch = FrontendWatch([self.registry.address])
        await self.watch.start()
        for number, host in enumerate(HOSTS):
            flags = {**common, "host": host, "port": str(self.port)}
            self.frontends[host] = ClusterProcess(f"frontend-{number}", "frontend", flags, self.logs)
        for host in HOSTS[:2]:
            await self.join(host)
        sources = {
            "registry": {"registry": self.registry.address},
            "dns": {"frontends": f"{NAME}:{self.port}", "dns-server": self.consul.dns},
        }
        for name, source in sources.items():
            flags = {"port": "0", "threads": "1", "drain-settle-s": "0", **source}
            self.loads[name] = Load(await self.start(ClusterProcess(f"edge-{name}", "edge", flags, self.logs)))

    async def down(self) -> None:
        if self.watch is not None:
            await self.watch.close()
        for process in reversed(self.processes):
            await process.stop()

    async def listed(self, address: str, is_listed: bool) -> None:
        """Return when the registry lists a frontend, or lists it no more."""
        assert self.watch is not None
        changed = self.watch.next_change
        while is_listed != (address in {frontend.address for frontend in self.watch.frontends()}):
            await changed.wait()
            changed = self.watch.next_change

    async def join(self, host: str) -> float:
        """Start a frontend; when the registry had it."""
        starting = asyncio.create_task(self.start(self.frontends[host]))
        await self.listed(f"{host}:{self.port}", True)
        registered_s = time.time()
        await starting
        return registered_s

    async def measured_join(self, host: str) -> dict[str, Any]:
        registered_s = await self.join(host)
        await asyncio.sleep(SETTLE_S + 0.5)  # Envoy writes its log every 0.2 s
        found = {}
        for name, load in self.loads.items():
            requests_s = load.requests_s(f"{host}:{self.port}", registered_s)
            assert requests_s, f"the edge that asks {name} sent {host} nothing"
            found[name] = {"first_request_ms": round(1e3 * min(requests_s))}
        return found

    async def end(self, host: str, number: signal.Signals) -> dict[str, Any]:
        """End a frontend; what the clients saw of it until the registry listed it no more, and a little longer."""
        address, frontend = f"{host}:{self.port}", self.frontends[host]
        ended_s = time.time()
        frontend.signal(number)
        await frontend.wait_ended()
        await self.listed(address, False)
        await asyncio.sleep(SETTLE_S)
        found = {}
        for name, load in self.loads.items():
            last_s = max(load.requests_s(address, ended_s), default=0.0)
            found[name] = {**load.failures(ended_s), "last_request_ms": round(1e3 * last_s)}
        return found

    async def outage(self, process: ClusterProcess) -> dict[str, Any]:
        """Kill Consul or the registry; then start it again, Consul without its data; how many requests failed."""
        begin_s = time.time()
        process.kill()
        await process.wait_ended()
        await asyncio.sleep(OUTAGE_S)
        dead = {name: load.failures(begin_s)["failed"] for name, load in self.loads.items()}
        begin_s = time.time()
        await self.start(process)
        await asyncio.sleep(OUTAGE_S)
        back = {name: load.failures(begin_s)["failed"] for name, load in self.loads.items()}
        return {name: {"failed_while_dead": dead[name], "failed_when_back": back[name]} for name in self.loads}


async def measure(rounds: int) -> dict[str, Any]:
    logs, run = Path(tempfile.mkdtemp(prefix="tandem-bench-")), run_directory.make()
    bench, steps = Bench(logs, run), {how: [] for how in STEPS}
    visitor = HOSTS[2]
    try:
        await bench.up()
        async with bench.loads["registry"].running(), bench.loads["dns"].running():
            await asyncio.sleep(SETTLE_S)
            for _ in range(rounds):
                for how, number in (("drain", signal.SIGTERM), ("kill", signal.SIGKILL)):
                    steps["join"].append(await bench.measured_join(visitor))
                    steps[how].append(await bench.end(visitor, number))
            for how, process in (("consul_killed", bench.consul), ("registry_killed", bench.registry)):
                steps[how] = [await bench.outage(process) for _ in range(rounds)]
        answered = {name: load.answered for name, load in bench.loads.items()}
    finally:
        await bench.down()
        shutil.rmtree(run, ignore_errors=True)
    return {"answered": answered, **{how: summary(found) for how, found in steps.items()}}


def summary(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Median and most of each measurement, for each edge."""
    return {
        name: {
            measurement: {"median": statistics.median(values), "most": max(values)}
            for measurement in found[0][name]
            for values in [[one[name][measurement] for one in found]]
        }
        for name in found[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(asyncio.run(measure(parser.parse_args().rounds)), indent=2))


if __name__ == "__main__":
    main()
