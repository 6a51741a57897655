"""How long a frontend sends legs to a dead or frozen worker while the registry is down, and the cost of detection.

    python -m benchmarks.dead_workers

Two pairs of simulated engines under a steady load, with the registry killed first. In each round a decode worker is
killed (then frozen), and the time of the last leg sent to it is reported, in milliseconds after the signal. Then the
CPU time of an idle frontend that watches 2 and 1,000 workers, all served by one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
from tandem_frontend.routing.worker_health import WorkerHealth

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.domain.worker import Capabilities, Worker, WorkerRole
from tandem.errors import TandemError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import Channels
from tandem.service import process
from tandem.service.awake_timers import AwakeTimers
from tandem.testing.eventually import assert_eventually

MODEL = Path("models") / "tandem-demo"
CLIENTS = 8
WATCHED_S = 4.0
IDLE_S = 20.0
SERVER = """
import asyncio
from tandem.rpc.server import RpcServer

async def serve():
    server = RpcServer()
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    print(server.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


class Load:
    """Requests one after the other; remembers when one had to be sent again, which only the fault can cause."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.missed_s: list[float] = []
        self.failed = 0
        self.done = 0
        self.latest_s = 0.0

    async def client(self) -> None:
        while True:
            began_s = time.monotonic()
            request = pb.GenerateRequest(prompt="Once upon a time", stopping={"max_tokens": 4})
            try:
                async for event in calls.generate(self.address, request):
                    if event.HasField("finish"):
                        self.done += 1
                        if event.finish.route.attempt > 1:
                            self.missed_s.append(began_s)
            except TandemError:
                self.failed += 1
            self.latest_s = max(self.latest_s, time.monotonic() - began_s)


async def round_of(number: signal.Signals) -> dict[str, float]:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    spec = ClusterSpec(model=MODEL, log_directory=logs, engine="simulated", prefill=2, decode=2)
    async with LocalCluster(spec) as cluster:
        load = Load(cluster.frontend.address)
        tasks = [asyncio.create_task(load.client()) for _ in range(CLIENTS)]
        await asyncio.sleep(1.5)
        cluster.registry.kill()
        await cluster.registry.wait_ended()
        await asyncio.sleep(0.5)
        load.missed_s.clear()
        assert not load.failed
        victim, done = cluster.process("decode-1"), load.done
        struck_s = time.monotonic()
        victim.signal(number)
        load.latest_s = 0.0
        await asyncio.sleep(WATCHED_S)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if number is signal.SIGSTOP:
            victim.signal(signal.SIGCONT)
        return {
            "last_leg_ms": round(1_000 * max(0.0, max(load.missed_s, default=struck_s) - struck_s), 1),
            "legs_sent": len(load.missed_s),
            "failed": load.failed,
            "requests": load.done - done,
            "slowest_ms": round(1_000 * load.latest_s),
        }


def workers(count: int, port: int) -> list[Worker]:
    names = {"engine": "simulated", "engine_version": "1", "model": "m", "model_digest": "m", "tokenizer_digest": "t"}
    places = {"kv_dtype": "float32", "kv_layout": "mha:2x2x32", "transfer_backend": "simulated"}
    sizes = ("context_tokens_max", "kv_capacity_tokens", "running_requests_max", "vocabulary_size")
    more = ("page_size_tokens", "kv_bytes_per_token")
    capabilities = Capabilities(**names, **places, **dict.fromkeys((*sizes, *more), 1), eos_token_ids=(1,))
    first = Worker(worker_id="w", epoch=1, role=WorkerRole.DECODE, address="", capabilities=capabilities)
    # Another address of loopback for each: another connection.
    hosts = [f"127.0.{number // 250}.{number % 250 + 1}" for number in range(count)]
    return [replace(first, worker_id=f"w{n}", address=f"{host}:{port}") for n, host in enumerate(hosts)]


async def cost_of(count: int) -> dict[str, float]:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER.replace('"127.0.0.1"', '"0.0.0.0"'), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        channels, process = Channels(), psutil.Process()
        health = WorkerHealth(channels, AwakeTimers())
        memory, files, began_s = process.memory_info().rss, process.num_fds(), time.monotonic()
        processor_s = spent_s(process)
        health.follow(workers(count, port))
        await assert_eventually(lambda: process.num_fds() - files >= count, within_s=60, every_s=0.01)
        opened_s, opening_s = time.monotonic() - began_s, spent_s(process) - processor_s
        await health.start()
        await asyncio.sleep(2)
        processor_s = spent_s(process)
        await asyncio.sleep(IDLE_S)
        percent = 100 * (spent_s(process) - processor_s) / IDLE_S
        assert not health.unhealthy()
        result = {
            "workers": count,
            "opened_s": round(opened_s, 2),
            "opening_processor_s": round(opening_s, 2),
            "idle_percent_of_one_core": round(percent, 2),
            "memory_mib": round((process.memory_info().rss - memory) / 2**20, 1),
        }
        await health.close()
        await channels.close()
        return result
    finally:
        server.kill()
        await server.wait()


def spent_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure(rounds: int) -> None:
    report: dict[str, object] = {}
    for name, number in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
        results = [await round_of(number) for _ in range(rounds)]
        last_ms = [result["last_leg_ms"] for result in results]
        report[name] = {"last_leg_ms": {"median": statistics.median(last_ms), "most": max(last_ms)}, "rounds": results}
    report["cost"] = [await cost_of(count) for count in (2, 1_000)]
    print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    process.raise_file_limit()
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
