"""WatchKvEvents of a worker with a simulated engine, over gRPC: snapshots, events, losses, slow readers, refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import Worker
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.errors import InvalidRequest, NotSupported
from tandem.rpc.server import RpcServer
from tandem.rpc.status import from_rpc_error
from tandem.testing.fake_model import write_fake_model
from tandem.worker import kv_messages
from tandem.worker.kv_messages import log_refusal
from tandem.worker.servicer import SERVICE_NAME, WorkerServicer
from tests.unit.support.frontend_workers import aggregated
from tests.unit.support.simulated_engines import AGGREGATED, DECODE, PROMPT, collect, request, running

PAGE = 16


class Identity:
    def __init__(self) -> None:
        self.worker = aggregated()

    def current(self) -> Worker:
        return self.worker


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def serving(engine: SimulatedEngine, identity: Any = None) -> AsyncIterator[pb_grpc.WorkerServiceAsyncStub]:
    """The stub of a worker around this engine."""
    legs: Any = None
    who: Any = identity or Identity()
    servicer = WorkerServicer(engine, legs, who, lambda: None)
    server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield pb_grpc.WorkerServiceStub(channel)
    finally:
        await server.stop(0)


async def read(stream: Any, kind: str) -> pb.WatchKvEventsResponse:
    message: pb.WatchKvEventsResponse = await asyncio.wait_for(stream.read(), 10)
    assert message.WhichOneof("event") == kind, message
    return message


async def read_contents(stream: Any) -> tuple[pb.KvCacheDescription, set[int]]:
    """A `cache` message and all parts of its snapshot."""
    first = await read(stream, "cache")
    found: set[int] = set()
    while True:
        message = await read(stream, "snapshot")
        assert message.sequence == first.sequence
        found.update(message.snapshot.block_hashes)
        if message.snapshot.is_last:
            assert len(found) == first.cache.blocks
            return first.cache, found


async def test_stream_begins_with_the_contents_and_follows(model_path: Path) -> None:
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        empty = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        cache, found = await read_contents(empty)
        assert (cache.blocks, found) == (0, set())
        tokens, _ = await collect(engine, request())
        hashes = block_hashes([*PROMPT, *tokens[:-1]], PAGE)
        first = await read(empty, "stored")
        assert (first.sequence, list(first.stored.block_hashes)) == (1, hashes[:2])
        assert (first.stored.block_size_tokens, list(first.stored.token_ids)) == (PAGE, [])
        assert not first.stored.HasField("parent_block_hash")
        newcomer = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True, include_token_ids=True))
        cache, found = await read_contents(newcomer)
        assert (cache.epoch, cache.block_size_tokens, cache.hash_rule) == (aggregated().epoch, PAGE, "sha256-chain-v1")
        assert found == set(hashes)
        longer = (*PROMPT[:32], *range(16))
        await collect(engine, request(longer, max_tokens=1))
        added = await read(newcomer, "stored")
        assert list(added.stored.block_hashes) == block_hashes(longer, PAGE)[2:]
        assert (added.stored.parent_block_hash, list(added.stored.token_ids)) == (hashes[1], list(range(16)))
        assert await engine.flush_cache()
        await read(newcomer, "cleared")


async def test_snapshot_comes_in_parts(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_messages, "SNAPSHOT_BLOCKS_MAX", 2)
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        engine.kv_cache().replace(range(5))
        stream = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        assert (await read(stream, "cache")).cache.blocks == 5
        parts = [(await read(stream, "snapshot")).snapshot for _ in range(3)]
        assert [(len(part.block_hashes), part.is_last) for part in parts] == [(2, False), (2, False), (1, True)]


async def test_loss_is_announced_and_its_repair_is_a_new_snapshot(model_path: Path) -> None:
    identity = Identity()
    async with running(model_path, AGGREGATED) as engine, serving(engine, identity) as stub:
        stream = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        await read_contents(stream)
        engine.kv_cache().lost()
        await read(stream, "unknown")
        identity.worker = replace(identity.worker, epoch=identity.worker.epoch + 1)
        engine.kv_cache().replace([1, 2, 3])
        cache, found = await read_contents(stream)
        assert found == {1, 2, 3}
        assert cache.epoch == aggregated().epoch + 1, "the worker was paused in between"


async def test_client_that_reads_too_slowly_gets_a_new_snapshot(model_path: Path) -> None:
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        mirror = engine.kv_cache()
        stream = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        await read_contents(stream)
        # More than all buffers between the two hold, without a turn for the worker's stream to read them one by one.
        for block in range(10_000):
            mirror.stored([block], None, [0] * PAGE)
        _, found = await read_contents(stream)
        assert found == set(range(10_000)) == set(mirror.snapshot().block_hashes)
        mirror.removed([7])
        assert list((await read(stream, "removed")).removed.block_hashes) == [7]


async def test_events_without_a_snapshot_begin_where_asked(model_path: Path) -> None:
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        for block in range(3):
            engine.kv_cache().removed([block])
        stream = stub.WatchKvEvents(pb.WatchKvEventsRequest(from_sequence=2))
        assert [(await read(stream, "removed")).sequence for _ in range(2)] == [2, 3]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"from_sequence": 1, "snapshot": True}, "from_sequence: must be absent together with snapshot"),
        ({"from_sequence": 0}, "from_sequence: must be at least 1"),
        ({"from_sequence": 1}, "from_sequence: 1 is no longer kept, only 2 and later"),
    ],
)
async def test_wrong_requests_name_the_field(model_path: Path, fields: dict[str, Any], problem: str) -> None:
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        engine.kv_cache().replace([])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WatchKvEvents(pb.WatchKvEventsRequest(**fields)).read()
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequest)
        assert str(error) == problem


async def test_worker_without_events_says_so(model_path: Path) -> None:
    async with running(model_path, DECODE) as engine, serving(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True)).read()
        assert isinstance(from_rpc_error(caught.value), NotSupported)
        await log_refusal(engine, "decode-1")


async def test_refusal_is_logged_once_with_the_workers_name(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(model_path, AGGREGATED) as engine, serving(engine) as stub:
        logging_it = asyncio.create_task(log_refusal(engine, "prefill-7"))
        stream = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        await read_contents(stream)
        with caplog.at_level(logging.ERROR):
            engine.kv_cache().refuse("its blocks have 8 tokens, its pages 16")
            await asyncio.wait_for(logging_it, 5)
        assert [r.getMessage() for r in caplog.records if "prefill-7" in r.getMessage()] == [
            "worker prefill-7: KV events of its engine are refused, and its cache stays unknown: "
            "its blocks have 8 tokens, its pages 16"
        ]
        await read(stream, "unknown")
