"""The tools of the fault tests, tested themselves: judges that condemn, faults that fire, a load that does not wait."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tandem.errors import LegFailed
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.cut_proxy import Cut, cut_proxy
from tests.faults.support.history import Asked, History, percentile
from tests.faults.support.process_faults import free_port, frozen, knock, prove_gone, state_of

KILLED_S = 100.0


def oracle(prompt: Sequence[int], count: int) -> list[int]:
    return [sum(prompt) + place for place in range(count)]


def asked(start_s: float, end_s: float | None = None, **more: object) -> Asked:
    """A request of three tokens that went well, but for what is said."""
    one = Asked(0, "here:1", (1, 2), 3, start_s, start_s + 0.1, end_s or start_s + 1, 1, ("p", "d"), [3, 4, 5])
    for name, value in more.items():
        setattr(one, name, value)
    return one


def leg_failed(worker: str, phase: str) -> LegFailed:
    return LegFailed("it broke", worker=worker, phase=phase)


def test_judges_acquit_what_went_well() -> None:
    history = History([asked(0), asked(1)])
    verdicts.none_failed(history)
    verdicts.tokens_are_exact(history, oracle)
    verdicts.is_large_enough(history, 2)
    verdicts.ran_through(history, 0.5, least=1)
    verdicts.none_went_to(history, "d", from_s=2)
    verdicts.went_to(history, "d", from_s=1)


@pytest.mark.parametrize("least", [1, 3])
def test_a_history_that_is_too_small_is_void(least: int) -> None:
    with pytest.raises(AssertionError, match="void"):
        verdicts.is_large_enough(History(), least)
    with pytest.raises(AssertionError, match="void"):
        verdicts.ran_through(History([asked(0)]), 50.0, least)


def test_a_failure_and_a_stream_without_an_end_are_found() -> None:
    with pytest.raises(AssertionError, match="1 of 2 requests failed"):
        verdicts.none_failed(History([asked(0), asked(0, failure=leg_failed("d", "decode"))]))
    endless = asked(0)
    endless.end_s = None
    with pytest.raises(AssertionError, match="never ended"):
        verdicts.none_failed(History([endless]))


@pytest.mark.parametrize("tokens", [[3, 4], [3, 5, 4], [3, 4, 5, 6], [3, 3, 4, 5], []])
def test_a_wrong_token_is_found(tokens: list[int]) -> None:
    with pytest.raises(AssertionError, match="wrong tokens"):
        verdicts.tokens_are_exact(History([asked(0, tokens=tokens)]), oracle)


def test_a_broken_stream_has_the_beginning_of_the_right_tokens() -> None:
    failure = leg_failed("d", "decode")
    verdicts.tokens_are_exact(History([asked(0, tokens=[3, 4], failure=failure)]), oracle)
    with pytest.raises(AssertionError, match="wrong tokens"):
        verdicts.tokens_are_exact(History([asked(0, tokens=[4], failure=failure)]), oracle)


def test_only_what_a_killed_worker_held_is_excused() -> None:
    excused = verdicts.held_by("d", KILLED_S)
    assert excused(asked(KILLED_S - 1, failure=leg_failed("d", "decode")))
    assert not excused(asked(KILLED_S - 1))
    assert not excused(asked(KILLED_S - 1, failure=leg_failed("d", "dispatched")))
    assert not excused(asked(KILLED_S - 1, failure=leg_failed("other", "decode")))
    assert not excused(asked(KILLED_S + 0.01, failure=leg_failed("d", "decode")))


@pytest.mark.parametrize(
    "later", [{}, {"workers": ("p", "e"), "attempt": 2}, {"workers": (), "failure": leg_failed("d", "dispatched")}]
)
def test_a_request_that_was_sent_to_a_dead_worker_is_found(later: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="1 requests were"):
        verdicts.none_went_to(History([asked(KILLED_S + 2, **later)]), "d", KILLED_S + 1)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 3.0
    assert percentile([1.0], 0.99) == 1.0


def is_going(state: str | None) -> bool:
    return state is not None and state in "SRD"


async def test_a_process_that_stands_still_and_one_that_is_gone_are_proved() -> None:
    sleeper = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        async with frozen(sleeper.pid):
            assert state_of(sleeper.pid) == "T"
        await assert_eventually(lambda: state_of(sleeper.pid), is_going)
    finally:
        sleeper.kill()
        await prove_gone(sleeper.pid)
        await sleeper.wait()
    assert state_of(sleeper.pid) is None


async def test_a_standstill_that_ended_early_is_no_standstill() -> None:
    sleeper = await asyncio.create_subprocess_exec("sleep", "60")

    async def wake_too_early() -> None:
        async with frozen(sleeper.pid):
            sleeper.send_signal(signal.SIGCONT)
            await assert_eventually(lambda: state_of(sleeper.pid), is_going)

    try:
        with pytest.raises(AssertionError, match="did not stand still"):
            await wake_too_early()
    finally:
        sleeper.kill()
        await sleeper.wait()


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """A server that says back what it hears; its host:port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def said_back(address: str, line: bytes = b"hello\n") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(line)
    assert await asyncio.wait_for(reader.readline(), 5) == line
    return reader, writer


async def test_a_silent_link_keeps_connections_and_what_was_said() -> None:
    async with echo() as target, cut_proxy(target) as link:
        reader, writer = await said_back(link.address)
        await link.sever(Cut.SILENT)
        writer.write(b"held\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readline(), 0.2)
        assert link.held_count
        await link.heal()
        assert await asyncio.wait_for(reader.readline(), 5) == b"held\n"
        writer.close()


@pytest.mark.parametrize(("cut", "met"), [(Cut.RESET, ("open", "reset")), (Cut.CLOSED, ("refused",))])
async def test_a_broken_link_breaks_what_is_there_and_what_comes(cut: Cut, met: tuple[str, ...]) -> None:
    async with echo() as target, cut_proxy(target) as link:
        reader, writer = await said_back(link.address)
        await link.sever(cut)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        # The kernel takes a connection before the link can break it.
        assert await asyncio.to_thread(knock, link.address) in met
        with pytest.raises((ConnectionError, AssertionError)):
            await said_back(link.address)
        await link.heal()
        _, writer = await said_back(link.address)
        writer.close()


async def test_a_silent_link_carries_no_news_of_an_end_either() -> None:
    async with echo() as target, cut_proxy(target) as link:
        reader, writer = await said_back(link.address)
        await link.sever(Cut.SILENT)
        writer.write_eof()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.2)
        await link.heal()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_half_closed_link_ends_the_stream_without_a_reset() -> None:
    async with echo() as target, cut_proxy(target) as link:
        reader, writer = await said_back(link.address)
        await link.sever(Cut.HALF)
        assert await asyncio.wait_for(reader.read(), 5) == b"", "the end did not arrive"
        for _ in range(3):  # a reset would refuse the second one
            writer.write(b"into nothing\n")
            await writer.drain()
            await asyncio.sleep(0.02)
        newer, newest = await asyncio.open_connection(*link.address.split(":"))
        assert await asyncio.wait_for(newer.read(), 5) == b""
        assert link.held_count >= 4
        newest.close()
        writer.close()
        await link.heal()
        _, writer = await said_back(link.address)
        writer.close()


@pytest.mark.parametrize(("cut", "least_s"), [(Cut.LATE, 0.2), (Cut.TRICKLE, 0.1)])
async def test_a_slowed_link_carries_everything_later(cut: Cut, least_s: float) -> None:
    line = bytes(range(32, 127)) * 2 + b"\n"
    async with echo() as target, cut_proxy(target) as link:
        reader, writer = await said_back(link.address)
        await link.sever(cut)
        begin_s = time.monotonic()
        writer.write(line)
        assert await asyncio.wait_for(reader.readline(), 5) == line
        assert time.monotonic() - begin_s > least_s
        assert link.held_count
        # What is new is slowed too, and is let in.
        _, newer = await said_back(link.address)
        newer.close()
        await link.heal()
        writer.close()


async def test_a_link_without_a_target_breaks() -> None:
    async with cut_proxy(f"127.0.0.1:{free_port()}") as link:
        with pytest.raises((ConnectionError, AssertionError)):
            await said_back(link.address)
