"""Overhead of Tandem's services over a pair of bare SGLang engines, both on the same GPUs at the same time.

The same comparison as benchmarks/pair_overhead.py makes on a CPU, with the same bare engine.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pair_overhead import BareEngine, Measured, ask_bare
from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import shapes
from tools.gpu.callers import Work, prompt, run
from tools.gpu.shapes import Load, Machine

ROUNDS = 20
ROUNDS_REHEARSED = 4
WARM = 3
PROMPT_TOKENS = 128
SHARED_KV_TOKENS = 32_768
"""Four engines share the memory."""
RUNNING_REQUESTS_MAX = 16


def shared(load: Load) -> Load:
    """What each of four engines on two GPUs may take."""
    tokens = min(load.kv_capacity_tokens, SHARED_KV_TOKENS)
    return replace(load, kv_capacity_tokens=tokens, running_requests_max=RUNNING_REQUESTS_MAX, frontends=1)


def bare_settings(machine: Machine, load: Load, number: int) -> dict[str, Any]:
    """Settings of a bare engine in the place of the worker of that number, equal to the worker's."""
    return {
        "device": machine.device,
        "dtype": machine.dtype,
        "running_requests_max": load.running_requests_max,
        "kv_capacity_tokens": load.kv_capacity_tokens,
        "extra": shapes.engine_extra(machine, number),
    }


class BarePair:
    """A prefill and a decode engine of SGLang's own, without any service around them."""

    def __init__(self, prefill: BareEngine, decode: BareEngine, where: dict[str, Any]) -> None:
        self.prefill = prefill
        self.decode = decode
        self.where = where
        self._runs = True

    @classmethod
    async def start(cls, machine: Machine, model: Path, load: Load, logs: Path | None = None) -> BarePair:
        """Return when both are up: an engine that starts later takes its share of what they have left."""
        engines: list[BareEngine] = []
        greetings: list[dict[str, Any]] = []
        try:
            for number, role in enumerate(("prefill", "decode")):
                log = None if logs is None else logs / f"bare-{role}.log"
                engines.append(await BareEngine.start(role, model, bare_settings(machine, load, number), log))
                if machine.gpus == 1:
                    greetings.append(await engines[-1].read())
            if not greetings:
                greetings = await asyncio.gather(*(engine.read() for engine in engines))
        except BaseException:
            await asyncio.gather(*(engine.stop() for engine in engines))
            raise
        return cls(engines[0], engines[1], greetings[0])

    async def stop(self) -> None:
        """End both; may be called twice."""
        if self._runs:
            self._runs = False
            await asyncio.gather(self.prefill.stop(), self.decode.stop())


async def compare(
    cluster: LocalCluster, pair: BarePair, new_tokens: int, vocabulary_size: int, rounds: int
) -> dict[str, Any]:
    """TTFT and pace of one stream at a time, in turn through the bare pair and through Tandem."""
    bare: list[Measured] = []
    tandem: list[Measured] = []
    for number in range(WARM + rounds):
        # Fresh prompts: neither side answers from its prefix cache.
        ids = prompt(PROMPT_TOKENS, vocabulary_size, 50_000 + number)
        one = await ask_bare(pair.prefill, pair.decode, pair.where, ids, new_tokens, f"bare-{number:06d}")
        work = Work(cluster.frontend.address, 1, 1, PROMPT_TOKENS, new_tokens, vocabulary_size, 90_000 + number)
        (streamed,) = await run(work)
        if number >= WARM:
            bare.append(one)
            tandem.append(Measured.of(streamed.begin_s, list(streamed.arrivals_s)))
    return {"rounds": rounds, "prompt_tokens": PROMPT_TOKENS, "bare": _medians(bare), "tandem": _medians(tandem)}


def _medians(measured: list[Measured]) -> dict[str, float]:
    return {
        "ttft_ms": round(1e3 * statistics.median(m.ttft_s for m in measured), 2),
        "tokens_per_s": round(statistics.median(m.tokens_per_s for m in measured), 1),
    }
