"""Measurements on a running cluster: parity, throughput, and decode latency while long prompts arrive."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import summaries
from tools.gpu.callers import Callers, Work, run
from tools.gpu.summaries import Streamed


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The work of a run: one for a GPU, a smaller one to rehearse on a CPU."""

    prompt_tokens: int
    new_tokens: int
    levels: tuple[int, ...]
    rounds: int
    """Requests of a level, as a multiple of how many run at a time."""
    long_prompt_tokens: int
    long_prompts: int
    long_every_s: float
    decodes: int
    decode_tokens: int
    parity_lengths: tuple[int, ...]


GPU = Size(
    prompt_tokens=512,
    new_tokens=128,
    levels=(1, 8, 64, 256),
    rounds=2,
    long_prompt_tokens=8000,
    long_prompts=16,
    long_every_s=0.4,
    decodes=16,
    decode_tokens=1000,
    parity_lengths=(
        1,
        2,
        3,
        5,
        8,
        15,
        16,
        17,
        31,
        33,
        48,
        64,
        65,
        100,
        127,
        128,
        129,
        200,
        256,
        300,
        400,
        500,
        511,
        600,
    ),
)
REHEARSAL = Size(
    prompt_tokens=32,
    new_tokens=8,
    levels=(1, 4),
    rounds=2,
    long_prompt_tokens=600,
    long_prompts=3,
    long_every_s=0.3,
    decodes=2,
    decode_tokens=500,
    parity_lengths=(1, 17, 64, 129, 300),
)
PARITY_TOKENS = 32
PARITY_SEED = 7
LEAD_S = 1.5
"""Decodes run undisturbed for so long before the first long prompt."""


def addresses(cluster: LocalCluster) -> list[str]:
    """Of all frontends."""
    return [frontend.address for frontend in cluster.frontends]


async def parity_streams(cluster: LocalCluster, size: Size, vocabulary_size: int, concurrent: int) -> list[Streamed]:
    """Greedy streams of prompts of many lengths; the same prompts on every cluster."""
    gate = asyncio.Semaphore(concurrent)

    async def one(length: int) -> Streamed:
        async with gate:
            work = Work(
                cluster.frontend.address, 1, 1, length, PARITY_TOKENS, vocabulary_size, PARITY_SEED, keep_tokens=True
            )
            return (await run(work))[0]

    return list(await asyncio.gather(*(one(length) for length in size.parity_lengths)))


def parity(
    size: Size, kv_bytes_per_token: int, streams: Sequence[Streamed], others: Sequence[Streamed]
) -> dict[str, Any]:
    """How many streams of a pair are those of the aggregated worker, and whether their KV moved."""
    equal = [a.token_ids == b.token_ids and a.failure is None for a, b in zip(streams, others, strict=True)]
    expected = [length * kv_bytes_per_token for length in size.parity_lengths]
    return {
        "prompts": len(streams),
        "equal": sum(equal),
        "different_lengths": [length for length, same in zip(size.parity_lengths, equal, strict=True) if not same],
        "first_difference_at": [
            _first_difference(a.token_ids, b.token_ids) for a, b in zip(streams, others, strict=True)
        ],
        "failures": sorted({s.failure for s in (*streams, *others) if s.failure}),
        "kv_bytes_exact": sum(s.moved_bytes == e for s, e in zip(streams, expected, strict=True)),
        "kv_bytes": [s.moved_bytes for s in streams],
        "recomputed_tokens": sum(s.recomputed_tokens or 0 for s in streams),
    }


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


async def throughput(
    cluster: LocalCluster, callers: Callers, size: Size, vocabulary_size: int, level: int
) -> dict[str, Any]:
    """One level of load."""
    make = functools.partial(
        Work, prompt_tokens=size.prompt_tokens, new_tokens=size.new_tokens, vocabulary_size=vocabulary_size
    )
    seed = int(time.monotonic() * 1e3)

    def seeded(**values: Any) -> Work:
        return make(**{**values, "seed": seed + values["seed"]})

    streams = await callers.spread(addresses(cluster), level, max(4, level * size.rounds), seeded)
    return {
        "concurrent": level,
        **summaries.summary(streams),
        "by_worker": summaries.by_worker(streams),
        "kv": summaries.transfers(streams),
    }


async def interference(cluster: LocalCluster, callers: Callers, size: Size, vocabulary_size: int) -> dict[str, Any]:
    """The gaps of running decodes, before long prompts arrive and while they do.

    Raises:
        RuntimeError: the decodes had ended by then, so that there is nothing to report.
    """
    where = addresses(cluster)
    seed = int(time.monotonic() * 1e3)
    decodes = Work(where[0], size.decodes, size.decodes, 64, size.decode_tokens, vocabulary_size, seed)
    running = asyncio.create_task(callers.run([decodes]))
    await asyncio.sleep(LEAD_S)
    begin_s = time.monotonic()
    long = Work(
        where[-1], size.long_prompts, size.long_prompts, size.long_prompt_tokens, 2, vocabulary_size, seed + 1,
        start_every_s=size.long_every_s,
    )  # fmt: skip
    (prompts,) = await callers.run([long])
    ended = [p.arrivals_s[-1] for p in prompts if p.failure is None and p.arrivals_s]
    (streams,) = await running
    end_s = min([max(ended, default=begin_s), *(s.arrivals_s[-1] for s in streams if s.arrivals_s)])
    busy_s = summaries.within(streams, begin_s, end_s)
    if not busy_s:
        raise RuntimeError("no token came while the long prompts were computed: the streams had ended, or never began")
    return {
        "decodes": len(streams),
        "long_prompts": len(prompts),
        "long_prompt_tokens": size.long_prompt_tokens,
        "window_s": round(end_s - begin_s, 2),
        "quiet_itl_ms": summaries.spread_ms(summaries.within(streams, begin_s - LEAD_S / 2, begin_s)),
        "busy_itl_ms": summaries.spread_ms(busy_s),
        "long_ttft_ms": summaries.spread_ms([p.ttft_s for p in prompts if p.failure is None]),
        "long_kv": summaries.transfers(prompts),
        "failed": [s.failure for s in (*streams, *prompts) if s.failure],
    }
