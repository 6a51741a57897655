"""Tensor parallelism: tokens of a fleet of TP 2 beside those of TP 1, a killed rank, and the refusal of unequal pairs.

The ranks of an engine add up their parts in another order than one GPU does, so that in bfloat16 tokens may differ
where two are nearly as likely. Agreement is reported for streams, and for each token by itself: after the tokens of
TP 1, so that one difference has no others behind it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client import calls
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tools.gpu import agreement, endings, measures
from tools.gpu.callers import prompt, request_of, stream
from tools.gpu.measures import PARITY_SEED, Size
from tools.gpu.summaries import Streamed

CONCURRENT = 8
TIMEOUT_S = 60.0
ENDED_TIMEOUT_S = 30.0
FIELD = "tensor_parallel_size"


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one fleet answered."""

    streams: list[Streamed]
    together: list[Streamed]
    """The same prompts, several at once."""


async def speak(cluster: LocalCluster, size: Size, vocabulary_size: int) -> Spoken:
    """Greedy streams of prompts of many lengths, one at a time and several at once."""
    alone = await measures.parity_streams(cluster, size, vocabulary_size, 1)
    together = await measures.parity_streams(cluster, size, vocabulary_size, CONCURRENT)
    return Spoken(alone, together)


async def one_by_one(
    cluster: LocalCluster, size: Size, vocabulary_size: int, references: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Every token of the references by itself: the greedy one after the prompt and the tokens before it."""
    gate = asyncio.Semaphore(CONCURRENT)
    asked: list[tuple[list[int], int]] = []
    for length, tokens in zip(size.parity_lengths, references, strict=True):
        ids = prompt(length, vocabulary_size, PARITY_SEED * 100_003)
        asked += [([*ids, *tokens[:at]], token) for at, token in enumerate(tokens)]
    async with open_channel(cluster.frontend.address) as channel:
        stub = InferenceServiceStub(channel)

        async def answer(ids: list[int]) -> int | None:
            async with gate:
                one = await stream(stub, request_of(ids, 1), TIMEOUT_S, True)
            return one.token_ids[0] if one.failure is None else None

        answers = await asyncio.gather(*(answer(ids) for ids, _ in asked))
    return agreement.per_token(answers, [token for _, token in asked])


def compare(one: Spoken, other: Spoken, size: Size, kv_bytes_per_token: int) -> dict[str, Any]:
    """TP 2 beside TP 1, and beside it what TP 1 alone differs in when it has several streams at once."""
    references = [streamed.token_ids for streamed in one.streams]
    streams = {"alone": other.streams, "together": other.together, "reference_together": one.together}
    found = {name: agreement.agreement([s.token_ids for s in spoken], references) for name, spoken in streams.items()}
    every = list(itertools.chain(one.streams, one.together, other.streams, other.together))
    moved = [
        (s.moved_bytes, length * kv_bytes_per_token)
        for s, length in zip(other.streams, size.parity_lengths, strict=True)
    ]
    pairs = any(moved_bytes is not None for moved_bytes, _ in moved)
    return {
        **found,
        "failures": sorted({s.failure for s in every if s.failure is not None}),
        "kv_bytes_exact": sum(has == should for has, should in moved) if pairs else None,
        "recomputed_tokens": sum(s.recomputed_tokens or 0 for s in other.streams) if pairs else None,
    }


async def pages(cluster: LocalCluster) -> dict[str, Any]:
    """Where the KV pages of each idle worker are: one rank's, because all have the same.

    Raises:
        RuntimeError: used, cached and free ones do not add up to the capacity.
    """
    await endings.until_free(cluster)
    found: dict[str, Any] = {}
    for worker in cluster.workers:
        load = await calls.worker_load(worker.address)
        found[worker.name] = {
            "capacity": load.kv_capacity_tokens,
            "used": load.kv_used_tokens,
            "cached": load.kv_cached_tokens,
            "free": load.kv_free_tokens,
        }
    wrong = [name for name, parts in found.items() if parts["capacity"] != sum(parts.values()) - parts["capacity"]]
    if wrong:
        raise RuntimeError(f"the pages of {', '.join(wrong)} do not add up: {found}")
    return found


async def kill_rank(cluster: LocalCluster, vocabulary_size: int) -> dict[str, Any]:
    """Kill the last rank of the last worker's engine: the worker must end, its other ranks with it.

    Raises:
        RuntimeError: the engine has one rank only, or a process of the worker is left.
    """
    victim = cluster.workers[-1]
    family = psutil.Process(victim.pid).children(recursive=True)
    ranks = sorted((child for child in family if _is_rank(child)), key=lambda child: child.pid)
    if len(ranks) < 2:
        raise RuntimeError(f"{victim.name} has {len(ranks)} ranks")
    begin_s = time.monotonic()
    ranks[-1].kill()
    status = await asyncio.wait_for(victim.wait_ended(), ENDED_TIMEOUT_S)
    ended_s = time.monotonic() - begin_s
    _, left = await asyncio.to_thread(psutil.wait_procs, family, ENDED_TIMEOUT_S)
    if left:
        raise RuntimeError(f"processes of {victim.name} are left: {left}")
    said = victim.last_words()
    begin_s = time.monotonic()
    await cluster.restart(victim.name)
    return {
        "ranks": len(ranks),
        "killed": victim.name,
        "exit_status": status,
        "said": said,
        "worker_ended_after_s": round(ended_s, 2),
        "restart_s": round(time.monotonic() - begin_s, 1),
        "after_restart": await endings.next_request(cluster, vocabulary_size),
    }


def _is_rank(child: psutil.Process) -> bool:
    return "scheduler" in child.name() or any("scheduler" in part for part in child.cmdline())


async def refusal(cluster: LocalCluster, vocabulary_size: int) -> dict[str, Any]:
    """A prefill worker of TP 2 and a decode worker of TP 1 only: a request is refused, and reaches neither.

    Raises:
        RuntimeError: it was not refused, for another reason, or a worker had a leg of it.
    """
    begin_s = time.monotonic()
    async with open_channel(cluster.frontend.address) as channel:
        ids = prompt(48, vocabulary_size, PARITY_SEED)
        streamed = await stream(InferenceServiceStub(channel), request_of(ids, 4), TIMEOUT_S, True)
    after_s = time.monotonic() - begin_s
    loads = {worker.name: await calls.worker_load(worker.address) for worker in cluster.workers}
    # Tokens and failures count since the worker's start, and nothing else was asked of it.
    legs = {name: load.open_legs + load.failed_legs + load.prompt_tokens for name, load in loads.items()}
    if streamed.failure is None or FIELD not in streamed.failure or any(legs.values()):
        raise RuntimeError(f"not refused by {FIELD}: {streamed.failure}, tokens {streamed.token_ids}, legs {legs}")
    return {"refused": streamed.failure, "after_s": round(after_s, 2), "traces_of_legs": legs}
