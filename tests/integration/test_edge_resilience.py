"""Several frontends behind one edge, under load: one is killed, one is asked to end; the edge is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from google.api.httpbody_pb2 import HttpBody

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.edge_host import admin_of, client_of, edge, stub_frontend
from tests.integration.test_simulated_cluster import STORY, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

CLIENTS = 6
TOKENS = 20
EXPECTED = oracle(STORY, TOKENS)


@dataclass
class Load:
    """Clients that call again as soon as they have their answer."""

    client: httpx.AsyncClient
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    stopped: bool = False

    async def _call(self) -> None:
        body = {"prompt": STORY, "sampling": {"temperature": 0}, "stopping": {"max_tokens": TOKENS}}
        while not self.stopped:
            try:
                response = await self.client.post("/v1/generate:unary", json=body)
            except httpx.HTTPError as problem:
                self.wrong.append(repr(problem))
                continue
            if response.status_code == 200 and response.json()["token_ids"] == EXPECTED:
                self.answered += 1
            else:
                self.wrong.append(response.text)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._call())
            try:
                await self.more(CLIENTS * 3)
                yield
                await self.more(CLIENTS * 3)
            finally:
                self.stopped = True

    async def more(self, count: int) -> None:
        """Wait for so many further answers."""
        goal = self.answered + count
        await assert_eventually(lambda: self.answered, lambda n: n >= goal, within_s=20, what="more answers")


@contextlib.asynccontextmanager
async def two_frontends(logs: Path) -> AsyncIterator[tuple[LocalCluster, Load]]:
    flags = {"edge": {"health-interval-s": "0.2"}}
    spec = {"engine": "simulated", "edge": True, "frontends": 2, "worker_flags": SIMULATED, "role_flags": flags}
    async with running(logs, **spec) as cluster:
        assert cluster.edge is not None
        async with client_of(cluster.edge) as client:
            yield cluster, Load(client)


async def took_part(cluster: LocalCluster, address: str) -> None:
    """Whether a frontend had been given requests: else its end would prove nothing."""
    assert cluster.edge is not None
    await assert_eventually(cluster.edge.log.read_text, lambda t: f'"frontend":"{address}"' in t, what="its share")


async def test_a_killed_frontend_loses_at_most_what_it_held(tmp_path: Path) -> None:
    async with two_frontends(tmp_path) as (cluster, load):
        victim = cluster.frontends[1]
        async with load.running():
            await took_part(cluster, victim.address)
            victim.signal(signal.SIGKILL)
            assert await victim.wait_ended() == -signal.SIGKILL
            lost_by = load.answered
        assert len(load.wrong) <= CLIENTS, load.wrong
        assert load.answered > lost_by
        settled = len(load.wrong)
        load.stopped = False
        async with load.running():
            pass
        assert len(load.wrong) == settled


async def test_a_frontend_that_is_asked_to_end_loses_nothing(tmp_path: Path) -> None:
    async with two_frontends(tmp_path) as (cluster, load):
        leaver = cluster.frontends[0]
        async with load.running():
            await took_part(cluster, leaver.address)
            assert await leaver.stop() == 0
        assert load.wrong == []


async def test_an_edge_that_is_asked_to_end_finishes_its_streams(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def slow() -> AsyncIterator[HttpBody]:
        for number in range(20):
            yield HttpBody(content_type="text/event-stream", data=f"data: {number}\n\n".encode())
            begun.set()
            await asyncio.sleep(0.05)

    async with stub_frontend() as (stub, address), edge(tmp_path, address, drain_settle_s=0.2) as process:
        stub.stream = slow
        async with client_of(process) as client, client_of(process) as late:
            call = asyncio.create_task(client.post("/v1/generate", json={"prompt": "x"}))
            await begun.wait()
            ending = asyncio.create_task(process.stop())
            await asyncio.sleep(0.1)
            # While it settles, it says that it goes, and still takes requests.
            assert (await late.get("/healthz")).status_code == 503
            response = await call
            assert response.text.count("data: ") == 20
        assert await ending == 0


async def test_envoy_does_not_outlive_an_edge_that_is_killed(tmp_path: Path) -> None:
    async with edge(tmp_path, "127.0.0.1:1") as process:
        (envoy,) = psutil.Process(process.pid).children()
        _, directory = admin_of(process)
        process.signal(signal.SIGKILL)
        await process.wait_ended()
        await assert_eventually(
            lambda: not envoy.is_running() or envoy.status() == psutil.STATUS_ZOMBIE, bool, within_s=5, what="its end"
        )
        shutil.rmtree(directory)  # no process was left to do it


async def test_an_edge_whose_envoy_dies_says_so_and_ends(tmp_path: Path) -> None:
    async with edge(tmp_path, "127.0.0.1:1") as process:
        (envoy,) = psutil.Process(process.pid).children()
        envoy.kill()
        assert await process.wait_ended() == 1
        assert "cannot continue: Envoy exited with status -9" in process.log.read_text()


async def test_a_reader_that_does_not_read_lets_a_frontend_run_ahead_by_little(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[HttpBody]:
        nonlocal sent
        while True:
            yield HttpBody(content_type="text/event-stream", data=b"data: " + b"x" * 10_000 + b"\n\n")
            sent += 10_000

    async with stub_frontend() as (stub, address), edge(tmp_path, address) as process, client_of(process) as client:
        stub.stream = endless
        async with client.stream("POST", "/v1/generate", json={"prompt": "x"}) as response:
            chunks = response.aiter_bytes(1000)
            await anext(chunks)
            stuck = await _standing_still(lambda: sent)
        assert stuck < 8 * 2**20


async def _standing_still(count: Callable[[], int]) -> int:
    """The count once it has not changed for a while."""
    end_time_s = time.monotonic() + 10
    last = -1
    while last != count():
        assert time.monotonic() < end_time_s, "it never stood still"
        last = count()
        await asyncio.sleep(0.5)
    return last


async def test_ctrl_c_in_a_terminal_lets_open_requests_end(tmp_path: Path) -> None:
    async with stub_frontend() as (stub, address), edge(tmp_path, address) as process, client_of(process) as client:
        go_on = asyncio.Event()

        async def slow() -> AsyncIterator[HttpBody]:
            yield HttpBody(content_type="text/event-stream", data=b"data: 1\n\n")
            await go_on.wait()
            yield HttpBody(data=b"data: 2\n\n")

        stub.stream = slow
        async with client.stream("POST", "/v1/generate", json={"prompt": "x"}) as stream:
            chunks = stream.aiter_text()
            assert await anext(chunks) == "data: 1\n\n"
            # A terminal sends it to the whole group of processes.
            os.killpg(process.pid, signal.SIGINT)
            await asyncio.sleep(0.3)
            go_on.set()
            assert await anext(chunks) == "data: 2\n\n"
        assert await process.wait_ended() == 0


async def test_an_edge_of_a_cluster_comes_back_after_it_was_asked_to_end(tmp_path: Path) -> None:
    async with running(tmp_path, engine="simulated", edge=True) as cluster:
        assert cluster.edge is not None
        cluster.edge.signal(signal.SIGTERM)
        assert await cluster.edge.wait_ended() == 0
        assert " (" not in cluster.edge.exit_summary()
        await cluster.restart("edge")
        async with client_of(cluster.edge) as client:
            assert (await client.get("/v1/models")).status_code == 200
