"""An index follows a simulated engine through its worker: exact, and right again after losses and restarts."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.client.kv_watch import KvWatch
from tandem.domain.worker import Worker
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tandem.worker.servicer import SERVICE_NAME, WorkerServicer
from tests.unit.support.frontend_workers import aggregated
from tests.unit.support.simulated_engines import AGGREGATED, collect, request, running

PAGE = 16
CAPACITY = {"kv_capacity_tokens": 1_024}


class Identity:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def current(self) -> Worker:
        return self.worker


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def serving(model_path: Path, epoch: int, **options: Any) -> AsyncIterator[tuple[SimulatedEngine, Worker]]:
    """A worker around a simulated engine with a small cache."""
    async with running(model_path, AGGREGATED, **CAPACITY, **options) as engine:
        legs: Any = None
        identity: Any = Identity(replace(aggregated(), epoch=epoch))
        servicer = WorkerServicer(engine, legs, identity, lambda: None)
        server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
        await server.start("127.0.0.1", 0)
        try:
            yield engine, replace(identity.worker, address=f"127.0.0.1:{server.port}")
        finally:
            await server.stop(0)


@asynccontextmanager
async def following() -> AsyncIterator[tuple[PrefixIndex, KvWatch]]:
    channels, index = Channels(), PrefixIndex(10_000)
    watch = KvWatch(channels, index)
    try:
        yield index, watch
    finally:
        await watch.close()
        await channels.close()


def prompts(count: int) -> list[tuple[int, ...]]:
    """Prompts that share beginnings of different lengths, and more of them than the cache holds."""
    rng = random.Random(5)
    known: list[tuple[int, ...]] = [()]
    for _ in range(count):
        begin = rng.choice(known[-12:])
        more = tuple(rng.randrange(20, 400) for _ in range(rng.randrange(20, 90)))
        known.append((begin[: rng.randrange(len(begin) + 1)] + more)[:300])
    return known[1:]


def pool_hashes(engine: SimulatedEngine) -> set[int]:
    return set(engine._running().pool.cached_names())


async def equal(index: PrefixIndex, worker: Worker, engine: SimulatedEngine, within_s: float) -> None:
    """Wait until the index holds what the engine's own pool holds."""

    def same() -> bool:
        held = pool_hashes(engine)
        all_there = all(index._table.holders(one) for one in held)
        return index.is_trusted(worker.start) and index.block_count == len(held) and all_there

    await assert_eventually(same, within_s=within_s, what="an index that equals the engine's pool")


async def test_an_index_that_follows_expects_what_the_engine_then_reports(model_path: Path) -> None:
    async with following() as (index, watch), serving(model_path, 7) as (engine, worker):
        watch.follow([worker])
        hits = 0
        for prompt in prompts(60):
            await equal(index, worker, engine, 5)
            expected = index.match(PromptBlocks(prompt)).get(worker.start, 0)
            _, finish = await collect(engine, request(prompt, 2))
            assert finish.cached_tokens == expected
            hits += bool(expected)
        assert hits > 10
        assert len(pool_hashes(engine)) < sum(len(prompt) // PAGE for prompt in prompts(60)), "it has evicted blocks"


async def test_an_index_equals_the_engine_again_after_losses_and_restarts(model_path: Path) -> None:
    async with following() as (index, watch):
        for epoch in (7, 8, 9):
            async with serving(model_path, epoch, kv_event_loss=0.1) as (engine, worker):
                watch.follow([worker])
                for prompt in prompts(40):
                    await collect(engine, request(prompt, 2))
                await equal(index, worker, engine, 3)
                assert index.trusted_count + index.suspected_count == 1, "of the former start nothing is left"
