"""The load generator: Tandem's own gRPC client, in as many processes as the load needs.

Each process runs its share of the streams, so that the client's interpreter is not the bottleneck. Times are from the
machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.rpc.channels import open_channel
from tools.gpu.summaries import Streamed

FIRST_ORDINARY_TOKEN = 16
SENTENCE_LENGTH_MAX = 200
WARM_S = 0.5
"""Longer than a process takes from one piece of work to the next, so that each gets one."""


@dataclass(frozen=True, slots=True)
class Work:
    """A number of requests of one kind, with a fixed concurrency, through one frontend."""

    address: str
    requests: int
    concurrent: int
    prompt_tokens: int
    new_tokens: int
    vocabulary_size: int
    seed: int
    timeout_s: float = 180.0
    keep_tokens: bool = False
    start_every_s: float = 0.0
    """Between the starts of two requests; 0: as soon as one of the concurrent ones has ended."""


def prompt(length: int, vocabulary_size: int, seed: int) -> list[int]:
    """Random tokens, so that no prefix cache has them."""
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(FIRST_ORDINARY_TOKEN, vocabulary_size) for _ in range(length)]


def request_of(token_ids: Sequence[int], new_tokens: int, cache_salt: str = "") -> pb.GenerateRequest:
    """Greedy, and exactly so many tokens. Prefix caches have nothing under a fresh salt."""
    request = pb.GenerateRequest()
    if cache_salt:
        request.cache_salt = cache_salt
    request.sampling.temperature = 0.0
    request.stopping.max_tokens = new_tokens
    request.stopping.ignore_eos = True
    request.token_ids.ids.extend(token_ids)
    return request


@dataclass(slots=True)
class Heard:
    """What a stream has had so far, which can be watched while it runs."""

    arrivals_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    workers: tuple[str, ...] = ()
    attempts: int = 1
    in_order: bool = True
    timings: Any = None
    chunk_count: int = 0

    def take(self, event: pb.GenerateResponse) -> None:
        """Note one event."""
        if event.HasField("accepted"):
            route = event.accepted.route
            self.workers = tuple(name for name in (route.prefill_worker_id, route.decode_worker_id) if name)
        elif event.HasField("chunk"):
            self.arrivals_s += [time.monotonic()] * len(event.chunk.token_ids)
            self.token_ids += event.chunk.token_ids
            self.in_order &= event.chunk.index == self.chunk_count
            self.chunk_count += 1
        elif event.HasField("finish"):
            self.timings = event.finish.timings
            self.attempts = event.finish.route.attempt

    def streamed(self, begin_s: float, failure: str | None, keep: bool) -> Streamed:
        """All of it, at the end."""
        moved_bytes, recomputed_tokens, moving_s = None, None, None
        if self.timings is not None and self.timings.HasField("kv_transfer_bytes"):
            ended, began = self.timings.kv_transfer_end_time, self.timings.kv_transfer_start_time
            moving_ns = ended.ToNanoseconds() - began.ToNanoseconds()
            moved_bytes, recomputed_tokens = self.timings.kv_transfer_bytes, self.timings.recomputed_tokens
            moving_s = moving_ns / 1e9 if moving_ns > 0 else None
        if failure is None and self.timings is None:
            failure = "no finish"
        elif failure is None and not self.arrivals_s:
            failure = "no tokens"
        return Streamed(
            begin_s, tuple(self.arrivals_s), failure, moved_bytes, recomputed_tokens, moving_s,
            tuple(self.token_ids) if keep else (), time.monotonic(), self.workers, self.attempts, self.in_order,
        )  # fmt: skip


async def stream(
    stub: InferenceServiceStub, request: pb.GenerateRequest, timeout_s: float, keep: bool, heard: Heard | None = None
) -> Streamed:
    """Run one request to its end; a failure is recorded, not raised. `heard` can be watched meanwhile."""
    import grpc

    heard = heard or Heard()
    begin_s = time.monotonic()
    try:
        call: Any = stub.Generate(request, timeout=timeout_s)
        async for event in call:
            heard.take(event)
    except grpc.aio.AioRpcError as failure:
        sentence = f"{failure.code().name}: {failure.details()}"[:SENTENCE_LENGTH_MAX]
        return heard.streamed(begin_s, sentence, keep)
    return heard.streamed(begin_s, None, keep)


async def run(work: Work) -> list[Streamed]:
    """All requests of one piece of work, in this process."""
    gate = asyncio.Semaphore(work.concurrent)
    async with open_channel(work.address) as channel:
        stub = InferenceServiceStub(channel)

        async def one(number: int) -> Streamed:
            token_ids = prompt(work.prompt_tokens, work.vocabulary_size, work.seed * 100_003 + number)
            request = request_of(token_ids, work.new_tokens)
            await asyncio.sleep(number * work.start_every_s)
            async with gate:
                return await stream(stub, request, work.timeout_s, work.keep_tokens)

        return list(await asyncio.gather(*(one(number) for number in range(work.requests))))


def _run_alone(work: Work) -> list[Streamed]:
    return asyncio.run(run(work))


class Callers:
    """Processes that call. Made once, because each takes a second to import what it needs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    async def warm(self) -> None:
        """Return when every process is there, so that no measurement waits for one."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._pool, time.sleep, WARM_S) for _ in range(self.count)))

    async def run(self, works: Sequence[Work]) -> list[list[Streamed]]:
        """Every piece of work in a process of its own, all at the same time."""
        assert len(works) <= self.count
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*(loop.run_in_executor(self._pool, _run_alone, work) for work in works)))

    async def spread(
        self, addresses: Sequence[str], concurrent: int, requests: int, make: Callable[..., Work]
    ) -> list[Streamed]:
        """A level of load, shared out over the processes and the frontends."""
        used = max(1, min(self.count, concurrent // 8))
        works = []
        for number in range(used):
            share = range(number, concurrent, used)
            count = len(range(number, requests, used))
            address = addresses[number % len(addresses)]
            works.append(make(address=address, concurrent=len(share), requests=count, seed=number))
        return [streamed for streams in await self.run(works) for streamed in streams]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
