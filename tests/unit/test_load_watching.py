"""Loads of workers: each is as old as its own stream's interval says, whatever later streams are opened with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from frontend_workers import decode, prefill

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.rpc import load_watching
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem.runtime.clock import ManualClock


class Told(pb_grpc.WorkerServiceServicer):
    """Says one load on each stream, and no more."""

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:  # noqa: N802
        yield pb.WatchLoadResponse(epoch=prefill().epoch)
        await asyncio.Event().wait()


async def test_a_load_stays_good_for_its_own_interval_when_the_fleet_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watching, "MESSAGES_PER_S_MAX", 0.5)
    name = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
    servicer = Told()  # type: ignore[abstract]
    server = RpcServer([(name, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    stays, goes = (replace(worker, address=f"127.0.0.1:{server.port}") for worker in (prefill(), decode()))
    channels, clock, arrived = Channels(), ManualClock(0.0), asyncio.Event()

    def look() -> None:
        if watch.of(stays.start) is not None:
            arrived.set()

    watch = load_watching.LoadWatch(channels, clock=clock, on_change=look)
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
        await server.stop(0)
