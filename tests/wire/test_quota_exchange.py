"""The exchange of what tenants use, over real servers: processes of a frontend, and frontends with each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from tandem_frontend.admission.quota_exchange import SERVICE_NAME, QuotaExchange, QuotaServicer
from tandem_frontend.admission.quotas import Quotas

from tandem.api.frontend.v1.quota_service_pb2_grpc import add_QuotaServiceServicer_to_server
from tandem.client import spending_watch
from tandem.clock import ManualClock
from tandem.domain.frontend import Frontend
from tandem.domain.quota import Quota
from tandem.rpc.backoff import Backoff
from tandem.rpc.http2.server import Http2RpcServer
from tandem.service.background import BackgroundTasks
from tandem.testing.eventually import assert_eventually

TEN = Quota(requests_per_minute=10, open_requests=4)
GATHER_S = 0.001


class Listed:
    """A registry's list of frontends that the test changes."""

    def __init__(self, frontends: Iterable[Frontend]) -> None:
        self._frontends = list(frontends)
        self.next_change = asyncio.Event()

    def frontends(self) -> Iterable[Frontend]:
        return self._frontends

    def remove(self, frontend_id: str) -> None:
        self._frontends = [one for one in self._frontends if one.frontend_id != frontend_id]
        changed, self.next_change = self.next_change, asyncio.Event()
        changed.set()


class Process:
    """One process of a frontend: its quotas, and the servers for siblings and for other frontends."""

    def __init__(self, frontend: int, number: int, directory: Path, count: int) -> None:
        self.frontend_id = f"frontend-{frontend}"
        self.path = directory / f"{frontend}-{number}.rpc"
        siblings = [f"unix:{directory}/{frontend}-{other}.rpc" for other in range(count) if other != number]
        self.quotas = Quotas(ManualClock(), f"{self.frontend_id}/{number}@1")
        self.exchange = QuotaExchange(self.quotas, siblings, frontend_id=self.frontend_id, gather_s=GATHER_S)
        self.server, self.sibling_server = Http2RpcServer(), Http2RpcServer()
        for server, own_only in ((self.server, False), (self.sibling_server, True)):
            servicer = QuotaServicer(self.exchange, own_only=own_only)
            server.add(SERVICE_NAME, partial(add_QuotaServiceServicer_to_server, servicer))
        self.server.bind("127.0.0.1", 0)
        self.sibling_server.bind_local(self.path)

    @property
    def frontend(self) -> Frontend:
        return Frontend(frontend_id=self.frontend_id, epoch=1, address=f"127.0.0.1:{self.server.port}", model="m")

    def left(self, tenant: str = "a") -> int:
        return int(dict(self.quotas.headers(tenant, TEN))["x-ratelimit-remaining-requests"])

    def send(self, count: int = 1, tenant: str = "a") -> None:
        self.exchange.begin()
        self.quotas.check(tenant, TEN, count)
        with self.quotas.taken(tenant, TEN, count):
            pass


class World:
    """Frontends of processes. Only the first process of each is reached at the frontend's address."""

    def __init__(self, directory: Path, frontends: int, count: int) -> None:
        self.processes = [Process(one, number, directory, count) for one in range(frontends) for number in range(count)]
        self.firsts = self.processes[::count]
        self.listed = Listed(process.frontend for process in self.firsts)

    @asynccontextmanager
    async def list_frontends(self) -> AsyncIterator[Listed]:
        yield self.listed

    async def all_have(self, left: int, tenant: str = "a", processes: Iterable[Process] = ()) -> None:
        """Return when every process counts as many requests left."""

        def found() -> set[int]:
            return {process.left(tenant) for process in processes or self.processes}

        await assert_eventually(found, lambda seen: seen == {left}, what=f"{left} left everywhere")


@asynccontextmanager
async def world_of(directory: Path, frontends: int, count: int, *, begins: bool = True) -> AsyncIterator[World]:
    """All of them serve; with `begins` each has had a caller with a quota."""
    world = World(directory, frontends, count)
    async with AsyncExitStack() as stack:
        for process in world.processes:
            for server in (process.server, process.sibling_server):
                stack.push_async_callback(server.stop, 0)
                await server.serve()
        for process in world.processes:
            stack.push_async_callback(process.exchange.close)
            if begins:
                process.exchange.begin()
        tasks = await stack.enter_async_context(BackgroundTasks())
        for process in world.processes:
            tasks.start(process.exchange.follow(world.list_frontends), process.quotas.source)
        yield world


async def test_what_any_process_admits_is_known_to_all(tmp_path: Path) -> None:
    """Two frontends of three processes; siblings of the process that is reached are reported by it."""
    async with world_of(tmp_path, 2, 3) as world:
        for number, process in enumerate(world.processes, 1):
            process.send()
            await world.all_have(10 - number)
        for process in world.processes:
            process.send(tenant="b")
        await world.all_have(10 - len(world.processes), "b")


async def test_open_requests_count_everywhere_until_they_end(tmp_path: Path) -> None:
    async with world_of(tmp_path, 2, 2) as world:
        for process in world.processes:
            process.send()
        await world.all_have(6)

        def room() -> set[str]:
            name = "x-ratelimit-remaining-open-requests"
            return {dict(process.quotas.headers("a", TEN))[name] for process in world.processes}

        with world.processes[3].quotas.taken("a", TEN, 3):
            await assert_eventually(room, lambda found: found == {"1"}, what="one left to open")
        await assert_eventually(room, lambda found: found == {"4"}, what="all of them")


async def test_open_requests_of_a_frontend_that_is_gone_do_not_count(tmp_path: Path) -> None:
    async with world_of(tmp_path, 2, 2) as world:
        for process in world.processes:
            process.send()
        await world.all_have(6)
        kept = world.processes[:2]

        def room() -> set[str]:
            return {dict(one.quotas.headers("a", TEN))["x-ratelimit-remaining-open-requests"] for one in kept}

        # Of its second process, which the others know through the first one only.
        with world.processes[3].quotas.taken("a", TEN, 3):
            await assert_eventually(room, lambda found: found == {"1"}, what="one left to open")
            await world.processes[2].server.stop(0)
            await assert_eventually(room, lambda found: found == {"4"}, what="all of them")
            world.listed.remove("frontend-1")
        kept[0].send()
        await world.all_have(6 - 3 - 1, processes=kept)


async def test_a_frontend_that_does_not_report_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a release before quotas, or one whose certificate lacks its address."""
    monkeypatch.setattr(spending_watch, "Backoff", lambda **_: Backoff(first_s=0.01, most_s=0.01))
    async with world_of(tmp_path, 2, 1) as world:
        world.processes[0].send()
        await world.all_have(9)
        await world.processes[1].server.stop(0)

        def warnings() -> int:
            return sum(record.levelname == "WARNING" for record in caplog.records)

        await assert_eventually(warnings, what="a warning")
        world.processes[0].send(4)
        world.processes[0].send(4)
        world.processes[0].send()
        assert world.processes[0].left() == 0
        assert warnings() == 1
        assert "quotas count without it" in caplog.text


async def test_nothing_is_followed_before_the_first_quota(tmp_path: Path) -> None:
    async with world_of(tmp_path, 2, 2, begins=False) as world:
        assert not any(process.exchange.is_following for process in world.processes)
        world.processes[0].send(3)
        # The others hear of it with their own first request, and begin with what is left.
        world.processes[3].send()
        await world.all_have(6, processes=[world.processes[0], world.processes[3]])
