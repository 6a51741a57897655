"""Worker health as a frontend sees it itself, without a registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import psutil
import pytest
from tandem_frontend.routing.worker_health import CHECK_TIMEOUT_S, DRAIN_NOTICE_S, WorkerHealth

from tandem.domain.worker import Start, Worker, WorkerState
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem.service.awake_timers import AwakeTimers
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import make_worker

FLEET = 250
SERVER = """
import asyncio
from tandem.rpc.server import RpcServer

async def serve():
    server = RpcServer()
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    print(server.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


@contextlib.asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[RpcServer]:
    server = RpcServer()
    await server.start("127.0.0.1", port)
    await server.set_serving(True)
    try:
        yield server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def following(*workers: Worker) -> AsyncIterator[WorkerHealth]:
    channels, timers = Channels(), AwakeTimers()
    health = WorkerHealth(channels, timers)
    try:
        await health.start()
        health.follow(workers)
        yield health
    finally:
        await health.close()
        timers.close()
        await channels.close()


def worker_at(port: int, worker_id: str = "decode-0") -> Worker:
    return make_worker(worker_id, address=f"127.0.0.1:{port}")


async def unhealthy_is(health: WorkerHealth, *starts: Start, within_s: float) -> None:
    await assert_eventually(health.unhealthy, lambda seen: seen == set(starts), within_s=within_s)


async def settled(health: WorkerHealth) -> None:
    """Wait until every worker was checked more than once."""
    await asyncio.sleep(1.2)
    assert not health.unhealthy()


async def test_a_worker_that_reports_not_serving_is_unhealthy_until_it_serves_again() -> None:
    async with serving() as server, following(worker := worker_at(server.port)) as health:
        await settled(health)
        await server.set_serving(False)
        await unhealthy_is(health, worker.start, within_s=0.5)
        await server.set_serving(True)
        await unhealthy_is(health, within_s=0.5)


async def test_a_stopped_worker_is_unhealthy_at_once_and_healthy_after_its_restart() -> None:
    async with contextlib.AsyncExitStack() as life, serving() as other:
        server = await life.enter_async_context(serving())
        gone = worker_at(server.port)
        async with following(gone, worker_at(other.port, "decode-1")) as health:
            await settled(health)
            await life.aclose()
            await unhealthy_is(health, gone.start, within_s=0.5)
            async with serving(server.port):
                await unhealthy_is(health, within_s=5)


async def test_an_unreachable_worker_is_unhealthy() -> None:
    async with serving() as server:
        port = server.port
    async with following(worker := worker_at(port)) as health:
        await unhealthy_is(health, worker.start, within_s=3)


async def test_a_frozen_worker_is_unhealthy_within_a_second_until_it_resumes() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        worker = worker_at(int(await process.stdout.readline()))
        async with following(worker) as health:
            await settled(health)
            process.send_signal(signal.SIGSTOP)
            await unhealthy_is(health, worker.start, within_s=1.5)
            process.send_signal(signal.SIGCONT)
            await unhealthy_is(health, within_s=3)
    finally:
        process.kill()
        await process.wait()


async def test_a_worker_is_checked_at_once_when_a_request_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large fleet its regular check would come much later."""
    monkeypatch.setattr("tandem_frontend.routing.worker_health.CHECK_INTERVAL_S", 3600.0)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        worker = worker_at(int(await process.stdout.readline()))
        async with following(worker) as health:
            assert await health.check(worker)
            process.send_signal(signal.SIGSTOP)
            assert not await health.check(worker)
            assert health.unhealthy() == {worker.start}
            known = health.unhealthy()
            assert not await health.check(worker)
            assert health.unhealthy() is known, "nothing has changed, and it is made anew"
    finally:
        process.kill()
        await process.wait()


async def test_time_in_which_the_frontend_was_stopped_is_no_worker_silence() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        worker = worker_at(int(await process.stdout.readline()))
        async with following(worker) as health:
            await settled(health)
            process.send_signal(signal.SIGSTOP)
            asked = asyncio.create_task(health.check(worker))
            await asyncio.sleep(0.05)
            # Longer than a worker may be silent, and it goes on before this loop does.
            time.sleep(2 * CHECK_TIMEOUT_S)  # noqa: ASYNC251 -- the loop has to stand still
            process.send_signal(signal.SIGCONT)
            assert await asked
            assert not health.unhealthy()
    finally:
        process.kill()
        await process.wait()


async def test_a_replaced_channel_is_left_and_its_worker_still_watched() -> None:
    """As after a certificate renewal: the old channel stays open until nothing uses it."""
    async with serving() as server, following(worker := worker_at(server.port)) as health:
        await settled(health)
        channels = health._channels
        former = channels.get(worker.address)
        channels.keep_only(())
        await assert_eventually(lambda: former.get_state(), lambda s: s is grpc.ChannelConnectivity.SHUTDOWN)
        assert not health.unhealthy()
        await server.set_serving(False)
        await unhealthy_is(health, worker.start, within_s=1)


async def test_connecting_to_a_large_fleet_marks_no_worker_unhealthy(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, the connections would exceed gRPC's connect timeout, which is short here."""
    monkeypatch.setattr("tandem.rpc.channels.CONNECT_MS", 100)
    server = RpcServer()
    await server.start("0.0.0.0", 0)
    await server.set_serving(True)
    try:
        # Another address of loopback for each: another connection.
        fleet = [make_worker(f"w{n}", address=f"127.0.{n // 250}.{n % 250 + 1}:{server.port}") for n in range(FLEET)]
        before = psutil.Process().num_fds()
        async with following(*fleet) as health:
            # Both ends of each are in this process.
            await assert_eventually(psutil.Process().num_fds, lambda count: count - before >= 2 * FLEET, within_s=30)
            await settled(health)
        assert not [record for record in caplog.records if record.name.endswith("worker_health")]
    finally:
        await server.stop(0)


async def test_a_removed_worker_is_forgotten_and_a_restarted_one_begins_healthy() -> None:
    async with serving() as server:
        port = server.port
    async with following(worker := worker_at(port)) as health:
        await unhealthy_is(health, worker.start, within_s=3)
        health.follow([replace(worker, epoch=2)])
        assert not health.unhealthy()
        await unhealthy_is(health, (worker.worker_id, 2), within_s=3)
        before = {task.get_name() for task in asyncio.all_tasks()}
        assert "health-decode-0" in before
        health.follow([])
        assert not health.unhealthy()
        await assert_eventually(
            lambda: {task.get_name() for task in asyncio.all_tasks()}, lambda names: "health-decode-0" not in names
        )


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if "worker decode-0" in record.message]


@pytest.mark.parametrize("view_is_late", [False, True])
async def test_a_drain_is_no_warning_and_has_a_line_at_its_end(
    caplog: pytest.LogCaptureFixture, view_is_late: bool
) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as server, following(worker := worker_at(server.port)) as health:
        await settled(health)
        draining = replace(worker, state=WorkerState.DRAINING)
        if not view_is_late:
            health.follow([draining])
        await server.set_serving(False)
        await unhealthy_is(health, worker.start, within_s=0.5)
        health.follow([draining])
        await asyncio.sleep(2 * DRAIN_NOTICE_S)
        health.follow([])
    assert lines(caplog) == [
        ("INFO", "worker decode-0 is draining: it gets no new requests"),
        ("INFO", f"worker decode-0 (epoch {worker.epoch}) has left the registry: it is no longer watched"),
    ]


async def test_an_unhealthy_worker_is_a_warning_until_it_is_healthy_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as server, following(worker_at(server.port)) as health:
        await settled(health)
        await server.set_serving(False)
        await asyncio.sleep(2 * DRAIN_NOTICE_S)
        await server.set_serving(True)
        await unhealthy_is(health, within_s=0.5)
        health.follow([])
    assert lines(caplog) == [
        ("WARNING", "worker decode-0 is unhealthy and avoided: it reports NOT_SERVING"),
        ("INFO", "worker decode-0 is healthy again: its health stream reports SERVING"),
    ]
