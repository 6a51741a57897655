"""Load reports: each expires by the interval of its own stream, and the listener is notified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import uvloop

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
    monkeypatch.setattr(load_watch, "EXPIRY_MIN_S", 0.1)
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


class ScriptedCall:
    """Has several reports at hand at the same moment, as the calls of a loop that was held up."""

    def __init__(self, count: int) -> None:
        epoch = prefill().epoch
        self._reports = [pb.WatchLoadResponse(epoch=epoch, running_requests=number) for number in range(count)]

    async def read(self) -> pb.WatchLoadResponse:
        if not self._reports:
            await asyncio.Event().wait()
        return self._reports.pop(0)

    def cancel(self) -> None:
        """Nothing is open."""


class ScriptedStub:
    def __init__(self, channel: Any) -> None:
        pass

    asked: ClassVar[list[pb.WatchLoadRequest]] = []

    def WatchLoad(self, request: pb.WatchLoadRequest) -> ScriptedCall:  # noqa: N802
        self.asked.append(request)
        return ScriptedCall(4)


def test_reports_that_come_after_an_expiry_that_is_due_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the services' own event loop: its handle of a timer in the past has no time."""
    monkeypatch.setattr(load_watch, "WorkerServiceStub", ScriptedStub)
    clock, heard = ManualClock(0.0), list[int | None]()

    async def watched() -> None:
        last = asyncio.Event()

        def hear(start: Start, load: EngineLoad | None) -> None:
            heard.append(None if load is None else load.running_requests)
            # Held up for longer than any report counts.
            clock.advance(10)
            if load is not None and load.running_requests == 3:
                last.set()

        channels = Channels()
        watch = load_watch.LoadWatch(channels, clock=clock, on_change=hear)
        watch.follow([prefill()])
        try:
            await asyncio.wait_for(last.wait(), 5)
        finally:
            await watch.close()
            await channels.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(watched())
    assert heard[:4] == [0, 1, 2, 3]


async def test_a_stream_that_ends_by_a_defect_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load_watch, "WorkerServiceStub", ScriptedStub)
    failed = asyncio.Event()

    def defective(start: Start, load: EngineLoad | None) -> None:
        asyncio.get_running_loop().call_soon(failed.set)
        raise ZeroDivisionError

    channels = Channels()
    watch = load_watch.LoadWatch(channels, on_change=defective)
    watch.follow([prefill()])
    await asyncio.wait_for(failed.wait(), 5)
    await watch.close()
    await channels.close()
    assert f"load-{prefill().worker_id} failed" in caplog.text


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


@pytest.mark.parametrize(("prefills", "interval_ms", "change_ms"), [(1, 250, 20), (25, 250, 62), (100, 1000, 250)])
async def test_changes_are_asked_for_as_often_as_the_fleet_allows(
    monkeypatch: pytest.MonkeyPatch, prefills: int, interval_ms: int, change_ms: int
) -> None:
    """Decode workers report no changes, so only those that compute prompts share the limit."""
    monkeypatch.setattr(load_watch, "WorkerServiceStub", ScriptedStub)
    monkeypatch.setattr(ScriptedStub, "asked", [])
    channels, heard = Channels(), asyncio.Event()
    watch = load_watch.LoadWatch(channels, on_change=lambda start, load: heard.set())
    fleet = [member for number in range(prefills) for member in (prefill(f"p{number}"), decode(f"d{number}"))]
    watch.follow(fleet)
    await asyncio.wait_for(heard.wait(), 5)
    await watch.close()
    await channels.close()
    asked = {(request.interval_ms, request.change_interval_ms) for request in ScriptedStub.asked}
    assert asked == {(interval_ms, change_ms)}
