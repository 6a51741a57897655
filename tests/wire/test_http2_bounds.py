"""What one peer may cost the others: frames without an effect, unfinished requests, unread answers, and GOAWAY."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from h2.events import PingAckReceived
from h2.exceptions import StreamClosedError

from tandem.rpc.channels import open_channel
from tandem.rpc.http2 import limits
from tandem.testing.eventually import assert_eventually
from tests.wire.support.http2_peer import (
    CHAT,
    LARGE,
    PUSHED,
    STREAM,
    UNARY,
    Echo,
    RawPeer,
    beside,
    echoing,
    framed,
    raw_peer,
    raw_unary,
)
from tests.wire.test_http2_abuse import CALM, DATA, HEADERS, PRIORITY, RST_STREAM, WINDOW_UPDATE, fields, flood, frame

ALTSVC = 10
INVALID, EXHAUSTED = 3, 8
MEBI = 2**20
SWALLOWED: dict[str, bytes] = {
    "resets of a closed stream": frame(RST_STREAM, b"\0\0\0\x08", 1),
    "windows of a closed stream": frame(WINDOW_UPDATE, b"\0\0\0\1", 1),
    "empty data of a closed stream": frame(DATA, b"", 1),
    "data of a closed stream": frame(DATA, b"x", 1),
    "headers of a stream that was reset": frame(HEADERS, b"\x82", 3, flags=5),
    "alternative services": frame(ALTSVC, b"\0\0"),
}
"""Frames of which h2 says nothing."""


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection's keepalive looks at its calls often, and waits for nothing long."""
    monkeypatch.setattr(limits, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(limits, "PING_TIMEOUT_S", 1.0)
    monkeypatch.setattr(limits, "PROGRESS_TIMEOUT_S", 0.4)


def without_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "idle_frame_budget", lambda: limits.Budget(10**9, 10**9))


async def reset_stream(peer: RawPeer, stream_id: int) -> None:
    peer.begin(stream_id, UNARY)
    peer.h2.reset_stream(stream_id)
    peer.flush()


@pytest.mark.parametrize("kind", SWALLOWED)
async def test_frames_that_h2_swallows_end_their_connection(kind: str) -> None:
    async with echoing() as (_, address, _server), beside(address) as answered, raw_peer(address) as peer:
        peer.ask(1, framed(b"x"))
        await peer.answer(1)
        await reset_stream(peer, 3)
        flooding = asyncio.create_task(flood(peer, 500 * SWALLOWED[kind], 40))
        await answered()
        await peer.closed()
        assert peer.goaway is None or peer.goaway.error_code == CALM
        await flooding


async def test_a_request_in_tiny_pieces_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge passes on what its clients send: the calls of others on that connection go on."""
    monkeypatch.setattr(limits, "small_piece_budget", lambda: limits.Budget(1_000, 0))
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        for stream_id, path in ((3, UNARY), (5, CHAT)):
            peer.ask(stream_id, framed(b"", length=MEBI), path, ends=False)
            peer.raw(1_100 * frame(DATA, b"x", stream_id))
            answer = await peer.answer(stream_id)
            assert answer.status == EXHAUSTED
            assert "small pieces" in answer.message
        peer.ask(7, framed(b"next"))
        assert (await peer.answer(7)).data == framed(b"next")
        assert not peer.answers[1].is_ended


async def test_small_messages_of_a_stream_are_no_tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each comes in two pieces, its length first."""
    monkeypatch.setattr(limits, "small_piece_budget", lambda: limits.Budget(2, 0))
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.begin(1, CHAT)
        message = framed(b"m")
        for _ in range(300):
            peer.raw(frame(DATA, message[:5], 1) + frame(DATA, message[5:], 1))
        await peer.until(lambda: len(peer.answers[1].data) == 300 * len(message))
        assert peer.answers[1].data == 300 * message


async def test_windows_for_what_was_read_and_long_frames_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "idle_frame_budget", lambda: limits.Budget(50, 0))
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(LARGE), STREAM)
        await peer.answer(1)
        assert len(peer.answers[1].data) == 1_000 * len(framed(LARGE)), "a window update went back for each message"
        for number in range(1, 300):
            peer.ask(2 * number + 1, framed(b"short"))
        await peer.until(lambda: sum(answer.is_ended for answer in peer.answers.values()) == 300)
        async with open_channel(address) as channel:
            prompt = b"p" * (4 * 10**6)
            assert await raw_unary(channel)(prompt, timeout=10) == prompt
        assert peer.goaway is None


async def test_one_connection_gets_one_part_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever arrives at once: frames wait in their buffer, and the loop goes round between them."""
    without_budget(monkeypatch)
    monkeypatch.setattr(limits, "TURN_S", 0.0)
    async with echoing() as (_, address, server), raw_peer(address) as peer:
        connection = next(iter(server._connections))
        peer.raw(500 * frame(PRIORITY, b"\0\0\0\0\1", 3))
        peer.ask(1, framed(b"last"))
        answer = asyncio.create_task(peer.answer(1))
        seen, most = connection._state.incoming_buffer.frame_count, 0
        while not answer.done():
            await asyncio.sleep(0)
            count = connection._state.incoming_buffer.frame_count
            seen, most = count, max(most, count - seen)
        assert seen > 500
        assert most <= 2
        assert answer.result().data == framed(b"last")


async def test_many_fields_of_one_byte_end_their_connection() -> None:
    async with echoing() as (_, address, _server), beside(address) as answered, raw_peer(address) as peer:
        block = peer.h2.encoder.encode([(":method", "POST"), (":path", UNARY)])
        begun_s = time.process_time()
        peer.raw(frame(HEADERS, block + b"\x90" * 4_000, 1, flags=5))
        await peer.closed()
        assert peer.goaway is not None
        assert peer.goaway.error_code == CALM
        assert time.process_time() - begun_s < 1
        await answered()


async def test_headers_that_are_refused_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "reset_budget", lambda streams_max: limits.Budget(10 * limits.LARGE_HEADERS_COST, 0))
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        await peer.until(lambda: peer.answers[1].data)
        large = [*fields(UNARY), *[("accept-encoding", "gzip, deflate")] * 1_092]
        for number in range(1, 12):
            peer.h2.send_headers(2 * number + 1, large, end_stream=True)
            peer.flush()
        await peer.until(lambda: peer.goaway)
        assert peer.goaway is not None
        assert peer.goaway.error_code == CALM
        assert peer.answers[3].status == INVALID
        assert not peer.is_closed
        assert not peer.answers[1].is_ended


async def hold(peer: RawPeer, path: str, count: int, size: int) -> None:
    for number in range(count):
        peer.ask(2 * number + 1, framed(b"h" * size, length=50_000), path, ends=False)
    peer.flush()
    await peer.writer.drain()


async def notice(peer: RawPeer) -> None:
    """Read all that has come."""
    seen = peer.saw(PingAckReceived)
    peer.h2.ping(bytes(8))
    peer.flush()
    await peer.until(lambda: peer.saw(PingAckReceived) > seen)


@pytest.mark.parametrize("path", [UNARY, CHAT])
async def test_who_holds_the_room_without_going_on_makes_room(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_BYTES_MAX", 400_000)
    async with echoing(request_bytes_max=60_000) as (_, address, server), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw_peer(address)) for _ in range(4)]
        for peer in peers:
            await hold(peer, path, 10, 9_900)
        await assert_eventually(lambda: server.held.bytes > 390_000)
        async with open_channel(address) as channel:
            for _ in range(5):
                assert await raw_unary(channel)(b"n" * 50_000, timeout=5) == b"n" * 50_000
        await asyncio.gather(*(notice(peer) for peer in peers))
        ended = [answer for peer in peers for answer in peer.answers.values() if answer.is_ended]
        assert ended
        assert {answer.status for answer in ended} == {EXHAUSTED}
        assert server.held.bytes <= 400_000


async def trickle(peer: RawPeer, stream_id: int) -> None:
    """A byte now and then."""
    with contextlib.suppress(Exception):
        while True:
            peer.raw(frame(DATA, b"x", stream_id))
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("path", [UNARY, CHAT])
async def test_a_byte_now_and_then_holds_no_request(path: str) -> None:
    async with echoing() as (echo, address, server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"h" * 5_000, length=50_000), path, ends=False)
        trickling = asyncio.create_task(trickle(peer, 1))
        answer = await peer.answer(1)
        trickling.cancel()
        assert answer.status == INVALID
        assert "did not go on" in answer.message
        assert server.held.bytes == 0
        await assert_eventually(lambda: not echo.running)


@pytest.mark.usefixtures("hurried")
async def test_a_message_has_a_time_for_the_whole_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROGRESS_TIMEOUT_S", 60.0)
    monkeypatch.setattr(limits, "MESSAGE_TIMEOUT_S", 0.3)
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"h", length=50_000), ends=False)
        assert (await peer.answer(1)).status == INVALID


@pytest.mark.usefixtures("hurried")
async def test_a_stream_of_requests_may_be_silent_between_messages() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"one"), CHAT, ends=False)
        with contextlib.suppress(TimeoutError):
            await peer.until(lambda: peer.answers[1].is_ended, within_s=1.2)
        peer.h2.send_data(1, framed(b"two"), end_stream=True)
        peer.flush()
        assert (await peer.answer(1)).data == framed(b"one") + framed(b"two")


async def test_a_call_that_is_under_way_when_its_client_is_sent_away_is_served() -> None:
    async with echoing() as (_, address, server), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"))
        await peer.answer(1)
        server.release(1)
        peer.ask(3, framed(b"under way"))
        assert (await peer.answer(3)).data == framed(b"under way")
        await peer.closed()
        assert peer.goaway is not None
        assert peer.goaway.last_stream_id == 3
        assert peer.goaway.error_code == 0


async def test_a_client_that_does_not_answer_is_sent_away_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GOAWAY_WAIT_S", 0.2)
    monkeypatch.setattr(limits, "CLOSE_TIMEOUT_S", 0.2)
    async with echoing() as (_, address, server), raw_peer(address):
        server.release(1)
        assert not [one for one in server._connections if not one.is_leaving], "it is asked once"
        await assert_eventually(lambda: not server._connections, within_s=3)


async def test_grpcs_client_loses_no_call_when_it_is_sent_away() -> None:
    async with echoing() as (_, address, server), open_channel(address) as channel:
        call = raw_unary(channel)
        is_done = False

        async def ask() -> None:
            while not is_done:
                assert await call(b"hello" * 500, timeout=5) == b"hello" * 500

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for _ in range(30):
            await asyncio.sleep(0.02)
            server.release(2)
        is_done = True
        await asyncio.gather(*asking)


async def unread(echo: Echo, peer: RawPeer, first: int, count: int, size: int) -> None:
    """Answers of whole messages that have to wait for a window of nothing."""

    async def push(request: bytes, context: Any) -> None:
        context.send(b"u" * int(request))

    echo.push = push
    for number in range(count):
        peer.ask(first + 2 * number, framed(b"%d" % size), PUSHED)
    await peer.writer.drain()


@pytest.mark.usefixtures("hurried")
async def test_an_answer_that_is_not_read_is_given_up() -> None:
    async with echoing() as (echo, address, server), beside(address), raw_peer(address, _4=0) as peer:
        await unread(echo, peer, 1, 2, 30_000)
        peer.ask(5, framed(LARGE), STREAM)
        await assert_eventually(lambda: server.unsent.bytes > 60_000 and not echo.running - 1)
        for stream_id in (1, 3):
            assert (await peer.answer(stream_id)).reset is not None
        assert not peer.answers[5].is_ended, "a stream whose handler waits is the handler's"
        peer.h2.reset_stream(5)
        peer.flush()
        await assert_eventually(lambda: server.unsent.bytes == 0)


@pytest.mark.usefixtures("hurried")
async def test_an_answer_that_is_read_byte_by_byte_is_given_up() -> None:
    async with echoing() as (echo, address, server), raw_peer(address, _4=0) as peer:
        await unread(echo, peer, 1, 1, 30_000)
        peer.gives_back = False

        async def read() -> None:
            while True:
                with contextlib.suppress(StreamClosedError):
                    peer.h2.increment_flow_control_window(1, 1)
                peer.flush()
                await asyncio.sleep(0.05)

        reading = asyncio.create_task(read())
        answer = await peer.answer(1)
        reading.cancel()
        assert answer.reset is not None, (answer.headers, answer.trailers, len(answer.data))
        assert server.unsent.bytes == 0


async def test_unread_answers_are_bounded_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has gone on least makes room, and gets an error where it can."""
    monkeypatch.setattr(limits, "UNSENT_BYTES_MAX", 200_000)
    async with echoing() as (echo, address, server), beside(address), raw_peer(address, _4=0) as peer:
        await unread(echo, peer, 1, 3, 60_000)
        await assert_eventually(lambda: server.unsent.bytes > 180_000)
        await unread(echo, peer, 7, 1, 60_000)
        await peer.until(lambda: peer.answers[1].is_ended)
        assert peer.answers[1].is_ended
        assert not [number for number in (3, 5, 7) if peer.answers[number].is_ended]
        assert server.unsent.bytes <= 200_000


async def test_long_answers_count_until_they_are_read() -> None:
    async with echoing() as (echo, address, server), raw_peer(address, _4=0) as peer:
        await unread(echo, peer, 1, 2, 100_000)
        await unread(echo, peer, 5, 1, 1_000)
        await assert_eventually(lambda: sum(server.unread_calls.values()) == 2 and server.unsent.bytes > 201_000)
        peer.h2.reset_stream(1)
        peer.h2.increment_flow_control_window(200_000)
        peer.h2.increment_flow_control_window(200_000, 3)
        peer.flush()
        await assert_eventually(lambda: not server.unread_calls)
