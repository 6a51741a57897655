"""What client processes on the same machine cost an engine at 512 streams: a control of `decode_heavy`.

The bare engine of that step has one process beside it, Tandem's a worker, frontends and many clients. If these slow the
engine's scheduler by sharing its processor cores, then a bare engine beside processes that use as much processor time
is slowed too, and a Tandem cluster whose clients and frontends have cores of their own is not.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Semaphore
from typing import Any

import psutil

from benchmarks.pair_overhead import BareEngine
from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import summaries
from tools.gpu.callers import Callers
from tools.gpu.decode_heavy import NEEDED_S, Asked, Bare, Heavy, Place, Tandem, WithCluster
from tools.gpu.overhead import bare_settings

PERIOD_S = 0.002
"""Of a burner: it computes for a part of each period, as a client does that wakes for each message."""
FEW_CALLERS = 4
START_TIMEOUT_S = 20.0


async def compare(name: str, place: Place, with_cluster: WithCluster) -> None:
    """Both engines on the first GPU; each side in each surrounding, the plain ones twice."""
    heavy = replace(place.heavy, levels=place.heavy.levels[-1:])
    level = heavy.levels[0]
    load = heavy.load(2, place.frontends)
    settings = bare_settings(place.machine, load, 0)
    engine = await BareEngine.start("aggregated", place.model, settings, place.machine.logs / name / "bare.log")
    few = Callers(FEW_CALLERS)
    try:
        await engine.read()
        await few.warm()

        async def use(cluster: LocalCluster) -> None:
            bare = Bare({"aggregated": engine}, {}, place.vocabulary_size)
            tandem = Tandem(cluster, place.callers, place.vocabulary_size)
            sides = {
                "bare": functools.partial(_ask, bare, heavy, level),
                "tandem": functools.partial(_ask, tandem, heavy, level),
                "bare_beside_burners": functools.partial(_beside, place, bare, heavy, level),
                "tandem_few_callers": functools.partial(
                    _ask, Tandem(cluster, few, place.vocabulary_size), heavy, level
                ),
                "tandem_own_cores": functools.partial(_own_cores, cluster, tandem, heavy, level),
            }
            for number in (0, 1, 2):
                # The first round warms both engines.
                for side, measure in sides.items() if number else list(sides.items())[:2]:
                    await place.results.take(f"{name}_{number}_{side}", NEEDED_S, measure)
            place.results.note(f"{name}_ratios", ratios(place.results.measured, name, sides))

        await with_cluster(load, 0, use)
    finally:
        few.close()
        await engine.stop()


def ratios(measured: dict[str, Any], name: str, sides: Iterable[str]) -> dict[str, Any]:
    """Of each side in the two later rounds: tokens/s and mean ITL over those of the bare engine in the same round."""
    found: dict[str, Any] = {}
    for side in sides:
        for number in (1, 2):
            ours, bare = measured.get(f"{name}_{number}_{side}", {}), measured.get(f"{name}_{number}_bare", {})
            for figure in ("tokens_per_s", "steady_tokens_per_s", "itl_mean_p50_ms"):
                if ours.get(figure) and bare.get(figure):
                    found.setdefault(side, {}).setdefault(figure, []).append(round(ours[figure] / bare[figure], 3))
    return found


async def _ask(side: Bare | Tandem, heavy: Heavy, level: int) -> dict[str, Any]:
    before = _children_s()
    asked = await side.ask(heavy, level, int(time.monotonic() * 1e3))
    return _figures(asked, level, before)


def _figures(asked: Asked, level: int, before: dict[int, float]) -> dict[str, Any]:
    spent_s = sum(after_s - before.get(pid, 0.0) for pid, after_s in _children_s().items())
    cpu_s = {**asked.cpu_s, "clients": spent_s}
    return {"streams": level, **summaries.decoding(asked.streams), "cores": summaries.cores(asked.streams, cpu_s)}


def _children_s() -> dict[int, float]:
    """Processor seconds of each client process: the children of this one that run its multiprocessing code."""
    found: dict[int, float] = {}
    for child in psutil.Process().children():
        try:
            if any("multiprocessing" in part for part in child.cmdline()):
                found[child.pid] = sum(child.cpu_times()[:2])
        except psutil.Error:
            continue
    return found


async def _beside(place: Place, bare: Bare, heavy: Heavy, level: int) -> dict[str, Any]:
    """The bare engine beside as many processes as Tandem's run has, with as much work for the processor."""
    measured = place.results.measured
    tandem = next(m for name, m in reversed(measured.items()) if name.endswith("_tandem") and "cores" in m)
    clients = tandem["cores"]["clients"] / place.callers.count
    services = [cores for name, cores in tandem["cores"].items() if name != "clients"]
    with burning([clients] * place.callers.count + services):
        return {**await _ask(bare, heavy, level), "burners": [round(clients, 3), place.callers.count, services]}


@contextmanager
def burning(shares: Sequence[float]) -> Iterator[None]:
    """A process for each of these shares of a core."""
    context = multiprocessing.get_context("spawn")
    ready = context.Semaphore(0)
    processes = [context.Process(target=burn, args=(share, ready), daemon=True) for share in shares]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            ready.acquire(timeout=START_TIMEOUT_S)
        yield
    finally:
        for process in processes:
            process.terminate()


def burn(share: float, ready: Semaphore) -> None:
    """Say that this process is there, then compute for a share of each period until it is ended."""
    ready.release()
    while True:
        begin_s = time.perf_counter()
        while time.perf_counter() - begin_s < share * PERIOD_S:
            pass
        time.sleep(max(0.0, PERIOD_S - (time.perf_counter() - begin_s)))


async def _own_cores(cluster: LocalCluster, tandem: Tandem, heavy: Heavy, level: int) -> dict[str, Any]:
    """Clients and frontends on the upper half of the cores, the worker and its engine on the lower half."""
    cores = os.cpu_count() or 2
    lower, upper = range(cores // 2), range(cores // 2, cores)
    crowd = [*_children_s(), *(frontend.pid for frontend in cluster.frontends)]
    workers = [worker.pid for worker in cluster.workers]
    engines = [child.pid for pid in workers for child in psutil.Process(pid).children(recursive=True)]
    placed = {**dict.fromkeys(crowd, upper), **dict.fromkeys((*workers, *engines), lower)}
    try:
        await asyncio.to_thread(_place, placed)
        return await _ask(tandem, heavy, level)
    finally:
        await asyncio.to_thread(_place, dict.fromkeys(placed, range(cores)))


def _place(placed: dict[int, range]) -> None:
    for pid, cores in placed.items():
        try:
            threads = psutil.Process(pid).threads()
        except psutil.Error:
            continue
        for thread in threads:
            try:
                os.sched_setaffinity(thread.id, cores)
            except OSError:
                continue
