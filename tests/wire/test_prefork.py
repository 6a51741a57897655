"""A parent that gives its connections to children: which child gets one, what a dead or frozen one costs, the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tandem.api.process.v1 import process_service_pb2 as pb
from tandem.api.process.v1.process_service_pb2_grpc import ProcessServiceStub
from tandem.errors import ConfigError, StartError
from tandem.rpc.channels import open_channel
from tandem.rpc.http2.listener import Listener
from tandem.service.prefork import parent as prefork
from tandem.service.prefork.parent import Prefork
from tandem.service.prefork.process import UNTAKEN_MAX, ChildProcess, State
from tandem.service.restart_budget import RestartPolicy
from tandem.testing.eventually import assert_eventually

PROGRAM = [sys.executable, str(Path(__file__).parent / "support" / "prefork_program.py")]
STARTS_WITHIN_S = 30.0
QUICK = RestartPolicy(first_delay_s=0.01)


class Family:
    """A parent of tests, and its clients."""

    def __init__(self, parent: Prefork, listener: Listener) -> None:
        self.parent = parent
        self.address = f"127.0.0.1:{listener.port}"
        self.clients = AsyncExitStack()

    async def connect(self) -> Any:
        """A client with a connection of its own; asks which process answers."""
        channel = await self.clients.enter_async_context(open_channel(self.address))
        stub: Any = ProcessServiceStub(channel)

        async def who() -> int:
            return int((await stub.GetFigures(pb.GetFiguresRequest(), timeout=10)).pid)

        return who

    async def dial(self) -> asyncio.Task[bytes]:
        """A connection without a call: the first byte of the child that takes it. gRPC would give up after a second."""
        reader, writer = await asyncio.open_connection(*self.address.split(":"))
        self.clients.callback(writer.close)
        return asyncio.create_task(reader.readexactly(1))

    async def all_serve(self) -> list[ChildProcess]:
        def serving() -> list[ChildProcess]:
            return [child for child in self.parent.children if child.state is State.SERVING]

        return await assert_eventually(
            serving, lambda found: len(found) == self.parent.count, within_s=STARTS_WITHIN_S, what="all serve"
        )

    async def kill(self, child: ChildProcess) -> None:
        child.kill()
        await assert_eventually(lambda: child.state is State.ENDED)

    async def counts(self) -> list[int]:
        return [child.connection_count for child in self.parent.children]


@asynccontextmanager
async def family(
    begins: Sequence[Mapping[str, Any]] = ({}, {}), policy: RestartPolicy = QUICK, **options: Any
) -> AsyncIterator[Family]:
    before = set(psutil.Process().children())
    listener = Listener("127.0.0.1", 0)
    parent = Prefork(PROGRAM, begins, listener, drain_s=1, policy=policy, **options)
    found = Family(parent, listener)
    try:
        await parent.start()
        yield found
    finally:
        await found.clients.aclose()
        await parent.stop()
        assert set(psutil.Process().children()) <= before, "no child outlives its parent's stop"


async def test_connections_are_spread_evenly_and_the_first_of_a_turn_rotates() -> None:
    async with family([{}] * 3) as found:
        children = await found.all_serve()
        clients = [await found.connect() for _ in range(9)]
        answered = Counter([await client() for client in clients])
        assert answered == {child.pid: 3 for child in children}
        await found.clients.aclose()
        await assert_eventually(found.counts, lambda counts: counts == [0, 0, 0])
        for _ in range(3):
            async with open_channel(found.address) as channel:
                stub: Any = ProcessServiceStub(channel)
                answered[(await stub.GetFigures(pb.GetFiguresRequest(), timeout=10)).pid] += 1
            await assert_eventually(found.counts, lambda counts: counts == [0, 0, 0])
        assert set(answered.values()) == {4}, "where all have as many, each has its turn"


async def test_a_dead_child_costs_its_own_connections_and_comes_back() -> None:
    restarts = 0

    def count() -> None:
        nonlocal restarts
        restarts += 1

    async with family(on_restart=count) as found:
        first, second = await found.all_serve()
        clients = {}
        for _ in range(4):
            client = await found.connect()
            clients[client] = await client()
        await found.kill(first)
        answers = [await (await found.connect())() for _ in range(3)]
        assert set(answers) <= {second.pid, found.parent.children[0].pid}
        for client, pid in clients.items():
            if pid == second.pid:
                assert await client() == pid, "connections of others do not notice"
        first_again, _ = await found.all_serve()
        assert first_again is not first
        assert restarts == 1


async def test_a_child_that_comes_back_gets_its_share_of_the_clients() -> None:
    """They have long-lived connections, and would stay away for ever."""
    async with family(policy=RestartPolicy(first_delay_s=2.0)) as found:
        first, second = await found.all_serve()
        clients = [await found.connect() for _ in range(6)]
        for client in clients:
            await client()
        await found.kill(first)

        async def all_ask() -> list[int]:
            # What was on its way to the dead one may fail; nothing else may.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await asyncio.gather(*(client() for client in clients))
            return await found.counts()

        await assert_eventually(all_ask, lambda _: second.connection_count == 6, what="all at the one that is left")
        await found.all_serve()
        await assert_eventually(all_ask, lambda counts: counts == [3, 3], within_s=10, what="an even share")


async def test_what_a_child_never_took_goes_to_another_when_it_dies() -> None:
    async with family() as found:
        first, second = await found.all_serve()
        os.kill(first.pid or 0, signal.SIGSTOP)
        dialling = [await found.dial() for _ in range(4)]
        await assert_eventually(lambda: (first.connection_count, second.connection_count) == (2, 2))
        await assert_eventually(lambda: sum(task.done() for task in dialling) == 2)
        first.kill()
        await asyncio.wait_for(asyncio.gather(*dialling), 5)
        await assert_eventually(lambda: second.connection_count == 4)


async def test_a_frozen_child_gets_few_connections_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefork, "PING_S", 0.1)
    monkeypatch.setattr(prefork, "SILENT_S", 0.5)
    async with family() as found:
        first, second = await found.all_serve()
        os.kill(second.pid or 0, signal.SIGSTOP)
        count = 2 * UNTAKEN_MAX + 10
        dialling = [await found.dial() for _ in range(count)]
        await assert_eventually(lambda: sum(task.done() for task in dialling) == count - UNTAKEN_MAX)
        assert (first.connection_count, second.connection_count) == (count - UNTAKEN_MAX, UNTAKEN_MAX)
        await assert_eventually(lambda: second.is_silent)
        os.kill(second.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(*dialling), 5)
        await assert_eventually(lambda: not second.is_silent)
        await asyncio.wait_for(await found.dial(), 5)
        assert second.connection_count == UNTAKEN_MAX + 1


async def test_a_child_that_lets_a_connection_lie_is_passed_over() -> None:
    """Long before it counts as silent: each further client would wait for it."""
    async with family() as found:
        first, second = await found.all_serve()
        os.kill(second.pid or 0, signal.SIGSTOP)
        dialling = [await found.dial() for _ in range(2)]
        await assert_eventually(lambda: second.is_late)
        # One after the other: together, they would make the other child late too where it gets no processor.
        for _ in range(6):
            dialling.append(await found.dial())
            await asyncio.wait_for(asyncio.shield(dialling[-1]), 5)
        await assert_eventually(lambda: sum(task.done() for task in dialling) == 7)
        assert (first.connection_count, second.connection_count) == (7, 1)
        os.kill(second.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(*dialling), 5)


async def test_a_silent_child_gets_nothing_although_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefork, "PING_S", 0.1)
    monkeypatch.setattr(prefork, "SILENT_S", 0.5)
    async with family() as found:
        first, second = await found.all_serve()
        os.kill(second.pid or 0, signal.SIGSTOP)
        await assert_eventually(lambda: second.is_silent)
        await asyncio.wait_for(asyncio.gather(*[await found.dial() for _ in range(4)]), 5)
        assert (first.connection_count, second.connection_count) == (4, 0)
        assert second.state is State.SERVING, "it is not killed"
        os.kill(second.pid or 0, signal.SIGCONT)
        await assert_eventually(lambda: not second.is_silent)


async def test_a_parent_that_was_stopped_takes_no_child_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefork, "PING_S", 0.1)
    monkeypatch.setattr(prefork, "SILENT_S", 0.4)
    async with family() as found:
        children = await found.all_serve()
        for _ in range(3):
            time.sleep(1)  # noqa: ASYNC251  # holds the loop
            await asyncio.sleep(0.15)
        assert not any(child.is_silent for child in children)


async def test_clients_wait_while_no_child_can_take_them() -> None:
    async with family() as found:
        children = await found.all_serve()
        for child in children:
            os.kill(child.pid or 0, signal.SIGSTOP)
        count = 2 * UNTAKEN_MAX + 5
        dialling = [await found.dial() for _ in range(count)]
        await assert_eventually(found.counts, lambda counts: counts == [UNTAKEN_MAX, UNTAKEN_MAX])
        assert not any(task.done() for task in dialling)
        for child in children:
            os.kill(child.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(*dialling), 5)
        assert sum(await found.counts()) == count


@pytest.mark.parametrize(
    ("refusal", "error", "sentence"),
    [("setting", ConfigError, "port: is odd"), ("start", StartError, "there is no model")],
)
async def test_what_a_child_says_that_cannot_start_is_said_by_the_parent(
    refusal: str, error: type[StartError], sentence: str
) -> None:
    with pytest.raises(error) as raised:
        async with family([{"refusal": refusal}] * 2):
            pass
    assert (str(raised.value), type(raised.value)) == (sentence, error)


async def test_children_that_die_at_once_are_given_up() -> None:
    policy = RestartPolicy(count_max=2, first_delay_s=0.01)
    with pytest.raises(StartError, match=r"process \d ended with status 3; giving up after 2 restarts"):
        async with family([{"dies": True}] * 2, policy=policy):
            pass


async def test_a_child_that_dies_too_often_is_given_up_and_the_others_serve_on() -> None:
    async with family(policy=RestartPolicy(count_max=1, first_delay_s=0.01)) as found:
        first, second = await found.all_serve()
        given_up = asyncio.create_task(found.parent.wait_given_up())
        await found.kill(first)
        (again, _) = await found.all_serve()
        assert again is not first
        assert not given_up.done()
        await found.kill(again)
        assert await given_up == "process 0 was killed by signal 9; giving up after 1 restarts"
        assert await (await found.connect())() == second.pid


@pytest.mark.parametrize("is_unclean", [False, True])
async def test_a_drain_is_clean_when_every_childs_is(is_unclean: bool) -> None:
    async with family([{}, {"is_unclean": is_unclean}]) as found:
        await found.all_serve()
        assert await found.parent.drain() is not is_unclean
        assert await (await found.connect())(), "connections until the stop are answered"


async def test_a_child_that_dies_in_a_drain_makes_it_unclean() -> None:
    async with family() as found:
        first, _ = await found.all_serve()
        os.kill(first.pid or 0, signal.SIGSTOP)
        draining = asyncio.create_task(found.parent.drain())
        await assert_eventually(lambda: found.parent.children[1].drained)
        first.kill()
        assert await draining is False


async def test_a_signal_to_one_child_drains_it_and_it_comes_back() -> None:
    """However often: it has not failed."""
    async with family(policy=RestartPolicy(count_max=0, first_delay_s=0.01)) as found:
        first, second = await found.all_serve()
        first.signal(signal.SIGTERM)
        await assert_eventually(lambda: first.state is State.ENDED, within_s=10)
        assert second.state is State.SERVING
        again, _ = await found.all_serve()
        assert again is not first
        assert first.drained


async def test_a_parent_answers_what_only_it_knows() -> None:
    async with family([{"asks": True}], answer=lambda question: {"said": f"parent of {question['what']}"}) as found:
        await found.all_serve()
        async with open_channel(found.address) as channel:
            stub: Any = ProcessServiceStub(channel)
            response = await stub.GetFigures(pb.GetFiguresRequest(), timeout=10)
        assert (response.release, response.pid) == ("parent of pid", os.getpid())


async def test_nothing_of_the_connections_is_left() -> None:
    async with family() as found:
        await found.all_serve()
        processes = [psutil.Process(), *psutil.Process().children()]
        async with open_channel(found.address) as channel:
            stub: Any = ProcessServiceStub(channel)
            await stub.GetFigures(pb.GetFiguresRequest(), timeout=10)
        before = [process.num_fds() for process in processes]
        for _ in range(10):
            clients = [await found.connect() for _ in range(20)]
            await asyncio.gather(*(client() for client in clients))
            await found.clients.aclose()
        await assert_eventually(found.counts, lambda counts: counts == [0, 0])
        after = [process.num_fds() for process in processes]
        assert all(now <= then + 3 for now, then in zip(after, before, strict=True)), (before, after)
