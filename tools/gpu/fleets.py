"""One fleet of several workers: throughput on short and on long prompts, long prompts beside running streams, and the
fleet that `tandem plan` recommends for what this one has seen.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import measures
from tools.gpu.callers import Callers
from tools.gpu.measures import Size
from tools.gpu.results import Results
from tools.gpu.shapes import Fleet

PERCENTILE = 0.95
PLAN_TIMEOUT_S = 120.0
SAID_MAX = 1_500


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of one length, and how many requests run at a time."""

    tokens: int
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetWork:
    """The work of every fleet."""

    prompts: dict[str, Prompts]
    new_tokens: int
    ttft_s: float
    """Goals of the plan."""
    itl_s: float


GPU = FleetWork(
    prompts={"short": Prompts(512, (64, 256)), "long": Prompts(8000, (8, 32))},
    new_tokens=128, ttft_s=2.0, itl_s=0.025,
)  # fmt: skip
REHEARSAL = FleetWork(
    prompts={"short": Prompts(64, (4, 8)), "long": Prompts(600, (4,))}, new_tokens=16, ttft_s=3.0, itl_s=0.5
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a fleet is measured with."""

    callers: Callers
    results: Results
    size: Size
    work: FleetWork
    vocabulary_size: int


async def measure(name: str, place: Place, fleet: Fleet, gpus: int, plans: Path, cluster: LocalCluster) -> None:
    """Every measurement of one fleet; a fleet of pairs is asked for a plan of at most `gpus` workers, below `plans`."""
    take, work = place.results.take, place.work
    for kind, prompts in work.prompts.items():
        size = replace(place.size, prompt_tokens=prompts.tokens, new_tokens=work.new_tokens)
        level = functools.partial(measures.throughput, cluster, place.callers, size, place.vocabulary_size)
        await take(f"{name}_{kind}_warm", 5, functools.partial(level, prompts.levels[0]))
        for concurrent in prompts.levels:
            await take(f"{name}_{kind}_{concurrent}", 10, functools.partial(level, concurrent))
    busy = functools.partial(measures.interference, cluster, place.callers, place.size, place.vocabulary_size)
    await take(f"{name}_interference", 15, busy)
    if fleet.prefill:
        await take(f"{name}_plan", 20, functools.partial(plan, cluster, work, gpus, plans / f"{name}-plan.json"))


async def plan(cluster: LocalCluster, work: FleetWork, workers_max: int, file: Path) -> dict[str, Any]:
    """What `tandem plan` says of the requests that this cluster has just had.

    Raises:
        RuntimeError: the command refused, or found no fleet; with its last words.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem.cli", "plan", "--address", cluster.registry.address, "--window", "600"),
        *("--ttft", str(work.ttft_s), "--itl", str(work.itl_s), "--percentile", str(PERCENTILE)),
        *("--workers-max", str(workers_max), "--json", str(file)),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(command.communicate(), PLAN_TIMEOUT_S)
    text = said.decode(errors="replace")[-SAID_MAX:]
    if command.returncode != 0:
        raise RuntimeError(f"tandem plan ended with status {command.returncode}: {text}")
    found = json.loads(await asyncio.to_thread(file.read_text))
    return {"fleet": found["plan"]["counts"], "goals": {"ttft_s": work.ttft_s, "itl_s": work.itl_s}, "said": text}


def planned(results: Mapping[str, Any]) -> tuple[str, Fleet] | None:
    """The latest plan among the results, and the measurement that has it; None: there is none."""
    for name in reversed(list(results)):
        found = results[name]
        if name.startswith("fleet_") and name.endswith("_plan") and isinstance(found, dict) and "fleet" in found:
            return name, Fleet(**found["fleet"])
    return None
