"""Cost of metrics in a frontend: `python -m benchmarks.metrics_cost`.

Starts three clusters side by side on simulated engines: without metrics, scraped every second, and pushing over OTLP to
an absent collector. Each round runs the same streams on each of them, in turn. Prints the CPU time of the frontend per
request (means over all rounds: the kernel counts in hundredths of a second), its memory, the duration of a scrape, and
the CPU time of recording one closed request trace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.config import ServiceConfig
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import open_metrics
from tandem.observability.request_metrics import RequestMetrics
from tandem.observability.request_trace import AttemptTrace, RequestTrace, Step

MODEL = Path("models") / "tandem-demo"
DEAD_COLLECTOR = "http://127.0.0.1:9"
KINDS: dict[str, dict[str, Any]] = {
    "off": {},
    "scraped": {"metrics": True},
    "dead_collector": {"otlp_endpoint": DEAD_COLLECTOR},
}


@dataclass
class Side:
    """One of the clusters, and what it has cost so far."""

    cluster: LocalCluster
    spent_ms: list[float] = field(default_factory=list)
    """Of the frontend for a request, by round."""
    scrapes_ms: list[float] = field(default_factory=list)

    @property
    def frontend(self) -> psutil.Process:
        return psutil.Process(self.cluster.frontend.pid)

    def processor_s(self) -> float:
        times = self.frontend.cpu_times()
        return times.user + times.system


async def ask(side: Side, max_tokens: int) -> None:
    request = pb.GenerateRequest(prompt="Once upon a time", stopping={"max_tokens": max_tokens, "ignore_eos": True})
    async for _ in calls.generate(side.cluster.frontend.address, request, 60):
        pass


async def scrape(side: Side) -> None:
    """Every second, as long as it runs."""
    url = f"http://{side.cluster.frontend.metrics_address}/metrics"

    def read() -> None:
        with urllib.request.urlopen(url, timeout=5) as response:
            response.read()

    while True:
        begin_s = time.perf_counter()
        await asyncio.to_thread(read)
        side.scrapes_ms.append(1e3 * (time.perf_counter() - begin_s))
        await asyncio.sleep(1)


@asynccontextmanager
async def sides(arguments: argparse.Namespace) -> AsyncIterator[dict[str, Side]]:
    flags = {"engine-extra": json.dumps({"decode_step_s": arguments.step_s}), "running-requests-max": "64"}
    async with AsyncExitStack() as stack:
        found = {}
        for name, own in KINDS.items():
            logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
            spec = ClusterSpec(model=MODEL, engine="simulated", log_directory=logs, worker_flags=flags, **own)
            found[name] = Side(await stack.enter_async_context(LocalCluster(spec)))
        scraping = asyncio.create_task(scrape(found["scraped"]))
        try:
            yield found
        finally:
            scraping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scraping


async def told_us(count: int = 20_000) -> float:
    """Processor time of this process for one record into metrics that are on."""
    metrics = open_metrics(ServiceConfig(metrics_port=0), Emitter.FRONTEND, "tandem-bench")
    await metrics.start("bench")
    attempt = AttemptTrace(policy="random", outcome="finished", end_s=1.0)
    trace = RequestTrace(
        begin_s=0.0, end_s=1.0, first_token_s=0.1, last_token_s=0.9, token_count=32, outcome="finished"
    )
    trace.attempts.append(attempt)
    trace.steps.append(Step("wait", 0.0, 0.01))
    report, begin_s = RequestMetrics(metrics), time.process_time()
    for _ in range(count):
        report(trace)
    spent_s = time.process_time() - begin_s
    await metrics.stop()
    return 1e6 * spent_s / count


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    async with sides(arguments) as found:
        for number in range(arguments.warm + arguments.rounds):
            for side in found.values():
                before_s = side.processor_s()
                await asyncio.gather(*(ask(side, arguments.max_tokens) for _ in range(arguments.streams)))
                spent_ms = 1e3 * (side.processor_s() - before_s) / arguments.streams
                if number >= arguments.warm:
                    side.spent_ms.append(spent_ms)
        return {
            "requests": arguments.rounds * arguments.streams,
            "tokens": arguments.max_tokens,
            "frontend_ms_per_request": {name: round(statistics.mean(s.spent_ms), 3) for name, s in found.items()},
            "frontend_resident_mb": {name: round(s.frontend.memory_info().rss / 1e6, 1) for name, s in found.items()},
            "scrape_ms_median": round(statistics.median(found["scraped"].scrapes_ms), 2),
            "told_us_per_request": round(await told_us(), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--step-s", type=float, default=0.002)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
