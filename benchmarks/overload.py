"""Goodput of a cluster under overload: `python -m benchmarks.overload`, and `--minutes 10` for its memory.

Finds the peak goodput of two prefill and two decode workers on simulated engines, then offers 1, 2 and 4 times that
load in the same run, in rounds that start with the peak load, because a shared machine changes within minutes. The
engines are slow, so that the frontend has CPU time left; the clients run in their own process. `overload_measurements`
computes goodput, rejections and the frontends' memory, and checks them against the goals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.overload_load import Asked, Plan
from benchmarks.overload_measurements import Measurements, measurements_of, memory_growth_mib, missed
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster

MODEL = Path("models") / "tandem-demo"
DECODES, RUNNING_MAX, STEP_S = 2, 8, 0.1
ENGINE = {"decode_step_s": STEP_S, "prefill_step_s": 0.02, "jitter": 0.1, "prefix_cache": False}
TOKENS_MEAN = 16
CAPACITY_PER_S = DECODES * RUNNING_MAX / (TOKENS_MEAN * STEP_S)
"""What the decode engines could finish if they never waited: where the search for the peak begins."""
SEARCHED = (0.9, 1.1, 1.3)
FACTORS = (1, 2, 4)
WARM_UP_S = 10.0
MEMORY_FROM_S = 120.0


class Bench:
    """One cluster and the loads on it."""

    def __init__(self, cluster: LocalCluster, directory: Path, arguments: argparse.Namespace) -> None:
        self.frontends = cluster.frontends
        self.idle = cluster.registry.address
        self.directory = directory
        self.arguments = arguments
        self.memory: list[tuple[float, float]] = []
        self.seed = arguments.seed

    async def load(self, rate_per_s: float, seconds: float) -> tuple[Measurements, float]:
        """Offer a load; its measurements, and the share of a core that the frontends took."""
        self.seed += 1
        file = self.directory / f"load-{self.seed}.jsonl"
        plan = Plan(
            frontends=[frontend.address for frontend in self.frontends],
            rate_per_s=rate_per_s,
            seconds=seconds,
            seed=self.seed,
            file=str(file),
            tenants=self.arguments.tenants,
            idle=self.idle,
        )
        before_s, begin_s = self.processor_s(), time.monotonic()
        clients = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.overload_load", stdin=asyncio.subprocess.PIPE
        )
        await clients.communicate(json.dumps(asdict(plan)).encode())
        assert clients.returncode == 0, "the clients failed"
        share = (self.processor_s() - before_s) / (time.monotonic() - begin_s)
        asked = [Asked(**json.loads(line)) for line in file.read_text().splitlines()]
        measurements = measurements_of(asked, rate_per_s, WARM_UP_S, seconds)
        print(f"{rate_per_s:6.1f}/s: {_line(measurements)}, frontends {100 * share:.0f} % of a core", file=sys.stderr)
        return measurements, share

    async def watch_memory(self) -> None:
        """Note the resident memory of all frontends, once a second, for ever."""
        begin_s = time.monotonic()
        processes = [psutil.Process(frontend.pid) for frontend in self.frontends]
        while True:
            mib = sum(process.memory_info().rss for process in processes) / 2**20
            self.memory.append((time.monotonic() - begin_s, mib))
            await asyncio.sleep(1.0)

    def processor_s(self) -> float:
        """Processor time of all frontends."""
        times = [psutil.Process(frontend.pid).cpu_times() for frontend in self.frontends]
        return sum(each.user + each.system for each in times)


def _line(found: Measurements) -> str:
    return (
        f"{found.good_per_s:.2f} good a second, {100 * found.refused_share:.0f} % refused in "
        f"{found.refusal_p50_ms:.1f} ms (p99 {found.refusal_p99_ms:.1f}), {100 * found.late_share:.1f} % late, "
        f"{100 * found.wasted_tokens_share:.1f} % of tokens wasted, lag {found.generator_lag_p99_ms:.1f} ms, "
        f"an idle process answers in {found.idle_p50_ms:.1f} ms (p99 {found.idle_p99_ms:.1f})"
    )


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    spec = ClusterSpec(
        model=MODEL,
        log_directory=directory,
        engine="simulated",
        prefill=2,
        decode=DECODES,
        frontends=arguments.frontends,
        worker_flags={"engine-extra": json.dumps(ENGINE), "running-requests-max": str(RUNNING_MAX)},
    )
    async with LocalCluster(spec) as cluster:
        bench = Bench(cluster, directory, arguments)
        search = [await bench.load(share * CAPACITY_PER_S, arguments.seconds) for share in SEARCHED]
        peak = max((found for found, _ in search), key=lambda found: found.good_per_s)
        loads: dict[str, tuple[Measurements, float]] = {}
        problems, growth_mib = [], None
        for number in range(1, arguments.rounds + 1):
            again = await bench.load(peak.offered_per_s, arguments.seconds)
            found = {f"round {number}, peak": again}
            for factor in FACTORS:
                load = await bench.load(factor * peak.good_per_s, arguments.seconds)
                found[f"round {number}, {factor}x"] = load
            beyond = {name: found for name, (found, _) in found.items() if not name.endswith(("peak", " 1x"))}
            problems += missed(again[0].good_per_s, beyond, None)
            loads |= found
        if arguments.minutes:
            watching = asyncio.create_task(bench.watch_memory())
            loads["4x, long"] = await bench.load(4 * peak.good_per_s, 60 * arguments.minutes)
            watching.cancel()
            growth_mib = memory_growth_mib(bench.memory, min(MEMORY_FROM_S, 20 * arguments.minutes))
    problems += missed(0.0, {}, growth_mib)
    return {
        "frontends": arguments.frontends,
        "tenants": arguments.tenants,
        "machine_load": os.getloadavg(),
        "peak_good_per_s": peak.good_per_s,
        "search": [asdict(found) for found, _ in search],
        "loads": {name: {**asdict(found), "frontends_cores": share} for name, (found, share) in loads.items()},
        "memory_growth_mib": growth_mib,
        "memory_mib_each_30_s": [round(mib, 1) for _, mib in bench.memory[::30]],
        "missed": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=50, help="seconds of each load, ten of warm-up included")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0, help="duration of a final 4x load, to observe memory")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
