"""Load reports: each expires by the interval of its own stream, and the listener is notified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.client import load_watch
from tandem.clock import ManualClock
from tandem.domain.worker import EngineLoad, Start
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tests.unit.support.frontend_workers import decode, prefill


class LoadServicer(pb_grpc.WorkerServiceServicer):
    """Reports one load on each stream, and no more."""

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:  # noqa: N802
        yield pb.WatchLoadResponse(epoch=prefill().epoch, running_requests=3)
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def load_server() -> AsyncIterator[int]:
    """A server on which all workers report their load; gives its port."""
    name = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
    servicer = LoadServicer()  # type: ignore[abstract]
    server = RpcServer([(name, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    try:
        yield server.port
    finally:
        await server.stop(0)


async def test_a_listener_gets_each_report_and_its_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "INTERVAL_S", 0.1)
    heard: asyncio.Queue[tuple[Start, EngineLoad | None]] = asyncio.Queue()
    channels = Channels()
    watch = load_watch.LoadWatch(channels, on_change=lambda start, load: heard.put_nowait((start, load)))
    async with load_server() as port, asyncio.timeout(10):
        worker = replace(prefill(), address=f"127.0.0.1:{port}")
        newer = replace(decode(), address=worker.address)
        try:
            watch.follow([worker])
            assert await heard.get() == (worker.start, EngineLoad(running_requests=3))
            assert watch.of(worker.start) is not None
            assert await heard.get() == (worker.start, None), "it says nothing more, and the load still counts"
            assert watch.of(worker.start) is None
            watch.follow([worker, newer])
            assert await heard.get() == (newer.start, EngineLoad(running_requests=3))
            watch.follow([worker])
            assert heard.get_nowait() == (newer.start, None), "a worker that is not followed any more"
        finally:
            await watch.close()
            await channels.close()
    assert heard.empty()


async def test_a_report_expires_by_its_own_interval_when_the_fleet_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "MESSAGES_PER_S_MAX", 0.5)
    channels, clock, arrived = Channels(), ManualClock(0.0), asyncio.Event()

    def look(start: Start, load: EngineLoad | None) -> None:
        if start == prefill().start and load is not None:
            arrived.set()

    watch = load_watch.LoadWatch(channels, clock=clock, on_change=look)
    async with load_server() as port:
        stays, goes = (replace(worker, address=f"127.0.0.1:{port}") for worker in (prefill(), decode()))
        try:
            watch.follow([stays, goes])
            await asyncio.wait_for(arrived.wait(), 5)
            watch.follow([stays])
            clock.advance(11)
            assert watch.of(stays.start) is not None
            clock.advance(2)
            assert watch.of(stays.start) is None
        finally:
            await watch.close()
            await channels.close()
