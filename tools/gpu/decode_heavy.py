"""Many concurrent streams of short prompts: does a worker's output path keep up with the GPU?

Bare SGLang engines and a Tandem cluster run with the same settings and get the same work in turn. They differ in the
path of a token: from the engine's step through the worker, gRPC and a frontend to a client in another process, or
through SGLang's own tokenizer manager to a loop in the same process. Aggregated, each side has a GPU; pairs share both,
and the side that is not measured is idle. With one GPU, all engines share it, and levels whose KV does not fit are
skipped.

Both sides may send several tokens at once when they lag: a frontend coalesces a stream's tokens, and SGLang's tokenizer
manager returns all tokens since the last read. So on both sides a gap is the time between two arrivals of a stream,
however many tokens each had (`summaries.gaps_between_arrivals_s`); the mean ITL is per token. SGLang's tokenizer
manager costs CPU time per token: where it saturates one core, the bare engine is slower than the GPU too, and Tandem
can be faster.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pair_overhead import BareEngine
from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import summaries
from tools.gpu.callers import Callers, Work, prompt
from tools.gpu.measures import addresses
from tools.gpu.overhead import BarePair, bare_settings
from tools.gpu.results import Results
from tools.gpu.shapes import Load, Machine
from tools.gpu.summaries import Streamed

NEEDED_S = 30.0
"""For one side of one level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heavy:
    """The work of this step."""

    prompt_tokens: int
    new_tokens: int
    levels: tuple[int, ...]
    """Streams at a time; the first warms both sides."""
    turned_level: int
    """Measured a second time with Tandem first, so that it shows what the order does."""
    kv_tokens: dict[int, int]
    """Of each engine, by how many share a GPU."""
    running_requests_max: int

    def load(self, sharing: int, frontends: int) -> Load:
        """What an engine is made for that shares a GPU with `sharing` - 1 others."""
        return Load(
            kv_capacity_tokens=self.kv_tokens[sharing],
            running_requests_max=self.running_requests_max,
            frontends=frontends,
        )

    def order(self, kv_capacity_tokens: int) -> Iterator[tuple[int, str]]:
        """Each level whose streams all find room, and which side is asked first."""
        for level in self.levels:
            if level * (self.prompt_tokens + self.new_tokens) > kv_capacity_tokens:
                continue
            yield level, "bare"
            if level == self.turned_level:
                yield level, "tandem"


# SGLang's decode takes a request only while 512 tokens are free for each one that runs, however far that has come: more
# than the 640 tokens that a stream ends with. On a GPU of 140 GB each of two engines has 25 GB left for all but KV.
GPU = Heavy(
    prompt_tokens=128, new_tokens=512, levels=(8, 64, 256, 512), turned_level=256,
    kv_tokens={1: 400_000, 2: 370_000, 4: 90_000}, running_requests_max=640,
)  # fmt: skip
REHEARSAL = Heavy(
    prompt_tokens=16, new_tokens=24, levels=(2, 4), turned_level=4,
    kv_tokens={2: 8192, 4: 8192}, running_requests_max=8,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What one side did for one level."""

    streams: list[Streamed]
    cpu_s: dict[str, float]
    """Processor seconds, user and system, of each of its processes that tokens pass through."""


class Bare:
    """Engines without any service, asked for many streams at once."""

    def __init__(self, engines: dict[str, BareEngine], where: dict[str, Any], vocabulary_size: int) -> None:
        """The last engine is the one that streams; `where` is where the two of a pair meet."""
        self._engines = engines
        self._where = where
        self._vocabulary_size = vocabulary_size

    async def ask(self, heavy: Heavy, level: int, seed: int) -> Asked:
        """All streams of a level; one fails when any of its engines broke it off."""
        works = [self._work(heavy, seed, number) for number in range(level)]
        for engine in reversed(self._engines.values()):
            engine.send(works)
        answers = await asyncio.gather(*(engine.read() for engine in self._engines.values()))
        cpu_s = {f"bare-{role}": answer["cpu_s"] for role, answer in zip(self._engines, answers, strict=True)}
        legs = zip(*(answer["streams"] for answer in answers), strict=True)
        return Asked([_streamed(parts) for parts in legs], cpu_s)

    def _work(self, heavy: Heavy, seed: int, number: int) -> dict[str, Any]:
        meeting = {**self._where, "room": random.getrandbits(62) + 1} if self._where else {}
        return {
            "rid": f"bare-{seed}-{number}",
            "token_ids": prompt(heavy.prompt_tokens, self._vocabulary_size, seed * 100_003 + number),
            "max_tokens": heavy.new_tokens,
            **meeting,
        }


def _streamed(legs: tuple[dict[str, Any], ...]) -> Streamed:
    """One stream, of what each of its engines said."""
    failures = [leg["failure"] for leg in legs if leg["failure"] is not None]
    times_s = tuple(legs[-1]["times_s"])
    failure = failures[0] if failures else None if times_s else "no tokens"
    return Streamed(legs[-1]["begin_s"], times_s, failure)


class Tandem:
    """A cluster, asked through all its frontends by many processes."""

    def __init__(self, cluster: LocalCluster, callers: Callers, vocabulary_size: int) -> None:
        self._cluster = cluster
        self._callers = callers
        self._vocabulary_size = vocabulary_size

    async def ask(self, heavy: Heavy, level: int, seed: int) -> Asked:
        """All streams of a level."""

        def make(**values: Any) -> Work:
            own = {**values, "seed": seed + values["seed"]}
            return Work(
                vocabulary_size=self._vocabulary_size,
                prompt_tokens=heavy.prompt_tokens,
                new_tokens=heavy.new_tokens,
                **own,
            )

        before_s = self._cpu_s()
        streams = await self._callers.spread(addresses(self._cluster), level, level, make)
        return Asked(streams, {name: after_s - before_s[name] for name, after_s in self._cpu_s().items()})

    def _cpu_s(self) -> dict[str, float]:
        """Of the services' own processes, without the engines that are the workers' children."""
        processes = [*self._cluster.workers, *self._cluster.frontends]
        return {process.name: sum(psutil.Process(process.pid).cpu_times()[:2]) for process in processes}


async def compare(results: Results, name: str, heavy: Heavy, load: Load, bare: Bare, tandem: Tandem) -> None:
    """Every level, one side after the other; each measurement is a result of its own."""
    sides: dict[str, Bare | Tandem] = {"bare": bare, "tandem": tandem}
    for level, first in heavy.order(load.kv_capacity_tokens):
        base = f"{name}_{level}" + ("" if first == "bare" else f"_{first}_first")
        for side in sorted(sides, key=lambda side: side != first):
            measure = functools.partial(_measure, sides[side], heavy, level)
            await results.take(f"{base}_{side}", NEEDED_S, measure)
        results.keep(f"{base}_ratios", summaries.ratios(*(results.measured[f"{base}_{side}"] for side in sides)))


async def _measure(side: Bare | Tandem, heavy: Heavy, level: int) -> dict[str, Any]:
    # By the clock, so that no prompt comes twice and is answered from a prefix cache.
    asked = await side.ask(heavy, level, int(time.monotonic() * 1e3))
    return {"streams": level, **summaries.decoding(asked.streams), "cores": summaries.cores(asked.streams, asked.cpu_s)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What both shapes of this step run with."""

    machine: Machine
    model: Path
    vocabulary_size: int
    frontends: int
    heavy: Heavy
    callers: Callers
    results: Results


WithCluster = Callable[[Load, int, Callable[[LocalCluster], Awaitable[None]]], Awaitable[None]]
"""Runs something with a cluster of that load, whose first worker is on that GPU."""


async def aggregated(name: str, place: Place, with_cluster: WithCluster) -> None:
    """One bare engine on the first GPU, one aggregated worker on the second."""
    apart = place.machine.gpus > 1
    load = place.heavy.load(1 if apart else 2, place.frontends)
    settings = bare_settings(place.machine, load, 0)
    engine = await BareEngine.start("aggregated", place.model, settings, place.machine.logs / name / "bare.log")
    try:
        if not apart:
            # An engine that starts meanwhile would take its share of memory that this one still needs.
            await engine.read()

        async def use(cluster: LocalCluster) -> None:
            if apart:
                await engine.read()
            bare = Bare({"aggregated": engine}, {}, place.vocabulary_size)
            tandem = Tandem(cluster, place.callers, place.vocabulary_size)
            await compare(place.results, name, place.heavy, load, bare, tandem)

        await with_cluster(load, 1, use)
    finally:
        await engine.stop()


async def pair(name: str, place: Place, with_cluster: WithCluster) -> None:
    """Two pairs on the same GPUs; the bare one is there first."""
    load = place.heavy.load(2 if place.machine.gpus > 1 else 4, place.frontends)
    engines = await BarePair.start(place.machine, place.model, load, place.machine.logs / name)
    try:

        async def use(cluster: LocalCluster) -> None:
            legs = {"prefill": engines.prefill, "decode": engines.decode}
            bare = Bare(legs, engines.where, place.vocabulary_size)
            tandem = Tandem(cluster, place.callers, place.vocabulary_size)
            await compare(place.results, name, place.heavy, load, bare, tandem)

        await with_cluster(load, 0, use)
    finally:
        await engines.stop()
