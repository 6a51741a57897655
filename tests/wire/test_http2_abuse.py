"""Peers of the server on h2 that want to harm it: each is held to a bound, and a client beside it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Any

import grpc
import psutil
import pytest
from h2.events import PingAckReceived

from tandem.rpc.channels import open_channel
from tandem.rpc.http2 import limits
from tandem.testing.eventually import assert_eventually
from tests.wire.support.http2_peer import (
    CHAT,
    PUSHED,
    STREAM,
    UNARY,
    RawPeer,
    beside,
    echoing,
    framed,
    raw_peer,
    raw_stream,
    raw_unary,
)

CALM = 11
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)


def frame(kind: int, payload: bytes = b"", stream_id: int = 0, flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream_id) + payload


def call_frames(peer: RawPeer, stream_id: int, body: bytes) -> bytes:
    """A call that the client's own h2 knows nothing of, and so cannot forbid."""
    head = frame(HEADERS, peer.h2.encoder.encode(fields(UNARY)), stream_id, flags=4)
    return head + frame(DATA, body, stream_id, flags=1)


async def flood(peer: RawPeer, piece: bytes, count: int) -> None:
    """Send it again and again, and read what comes, until the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for _ in range(count):
            peer.raw(piece)
            await peer.writer.drain()
            await asyncio.sleep(0)


FLOODS: dict[str, Callable[[], bytes]] = {
    "pings": lambda: 100 * frame(PING, bytes(8)),
    "settings": lambda: 100 * frame(SETTINGS),
    "settings that change all windows": lambda: (
        50 * (frame(SETTINGS, b"\0\4\0\0\0\1") + frame(SETTINGS, b"\0\4\0\0\1\0"))
    ),
    "empty data": lambda: 500 * frame(DATA, b"", 1),
    "padding": lambda: 500 * frame(DATA, b"\0", 1, flags=8),
    "priorities": lambda: 500 * frame(PRIORITY, b"\0\0\0\0\1", 3),
    "unknown frames": lambda: 500 * frame(77, b"", 0),
    "window updates": lambda: 500 * frame(WINDOW_UPDATE, b"\0\0\0\1"),
    "window updates of a stream": lambda: 500 * frame(WINDOW_UPDATE, b"\0\0\0\1", 1),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_what_means_nothing_ends_its_connection(kind: str) -> None:
    async with echoing() as (echo, address, _server), beside(address) as answered, raw_peer(address) as peer:
        peer.begin(1, UNARY)
        flooding = asyncio.create_task(flood(peer, FLOODS[kind](), 200))
        await answered()
        await peer.closed()
        assert peer.goaway is None or peer.goaway.error_code == CALM
        await flooding
        await answered()
        await assert_eventually(lambda: not echo.running)


async def test_a_peer_with_settings_of_all_numbers_is_closed() -> None:
    """They are all kept by h2, and there are 65,536 numbers."""
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.raw(frame(SETTINGS, b"".join(struct.pack(">HI", number, 1) for number in range(100, 2_000))))
        await peer.closed()
        assert peer.goaway is not None
        assert peer.goaway.error_code == CALM


async def test_clients_that_ask_every_few_seconds_and_measure_the_way_are_no_flood() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        for _ in range(15):
            for _ in range(10):
                peer.h2.ping(bytes(8))
            peer.flush()
            await peer.read()
        peer.ask(1, framed(b"x"))
        assert (await peer.answer(1)).data == framed(b"x")


async def test_pings_whose_answers_are_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the budget, which ends it earlier: acknowledgements wait for a socket that takes nothing."""
    monkeypatch.setattr(limits, "ping_budget", lambda: limits.Budget(10**9, 10**9))
    monkeypatch.setattr(limits, "CONTROL_BYTES_MAX", 100_000)
    async with echoing() as (_, address, server), beside(address) as answered, raw_peer(address) as peer:
        shrink_buffers(server)
        await flood(peer, 1_000 * frame(PING, bytes(8)), 1_000)
        await answered()
        await assert_eventually(lambda: len(server._connections) == 1, within_s=10)


def shrink_buffers(server: Any) -> None:
    """So that a test does not have to fill what the kernel would take."""
    for connection in server._connections:
        own = connection._transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)


async def test_answers_that_are_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals close their streams at once, so no bound of streams holds them back."""
    monkeypatch.setattr(limits, "CONTROL_BYTES_MAX", 100_000)
    async with echoing() as (_, address, server), beside(address) as answered, raw_peer(address) as peer:
        shrink_buffers(server)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for number in range(20_000):
                peer.raw(call_frames(peer, 2 * number + 1, b"\x02refused"))
                sent += 1
                if number % 100 == 0:
                    await peer.writer.drain()
                    await asyncio.sleep(0)
        await answered()
        await assert_eventually(lambda: len(server._connections) == 1, within_s=10)
        assert sent > 500


async def test_rapid_resets_are_answered_with_calm_and_running_calls_go_on() -> None:
    async with echoing() as (echo, address, _server), beside(address) as answered, raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        await peer.until(lambda: peer.answers[1].data)
        for number in range(1, 1_500):
            peer.begin(2 * number + 1, UNARY)
            peer.h2.reset_stream(2 * number + 1)
            if number % 100 == 0:
                peer.flush()
                await answered()
        peer.flush()
        await peer.until(lambda: peer.goaway is not None and (peer.goaway.last_stream_id or 0) < 2**31 - 1)
        assert peer.goaway is not None
        assert peer.goaway.error_code == CALM
        await answered()
        assert echo.running == 1, "the call that ran before still runs"
        assert not peer.is_closed
        # A peer that goes on all the same is not listened to for ever.
        with contextlib.suppress(ConnectionError):
            for number in range(1_500, 4_500):
                peer.raw(call_frames(peer, 2 * number + 1, b""))
                if number % 100 == 0:
                    await peer.writer.drain()
        await peer.closed()
        await assert_eventually(lambda: echo.cancelled == 1 and not echo.running)


async def test_a_client_may_give_up_all_that_it_has_open_at_once() -> None:
    async with echoing(streams_max=1_500) as (echo, address, _server), raw_peer(address) as peer:
        await peer.until(lambda: peer.h2.remote_settings.max_concurrent_streams == 1_500)
        for number in range(1_500):
            peer.begin(2 * number + 1, UNARY)
        for number in range(1_500):
            peer.h2.reset_stream(2 * number + 1)
        peer.ask(3_001, framed(b"next"))
        assert (await peer.answer(3_001)).data == framed(b"next")
        assert peer.goaway is None
        assert not echo.running


async def test_requests_that_are_cancelled_at_once_leave_no_task() -> None:
    async with echoing() as (echo, address, server), beside(address) as answered, raw_peer(address) as peer:
        for number in range(500):
            peer.ask(2 * number + 1, framed(b"wait"))
            peer.h2.reset_stream(2 * number + 1)
        peer.flush()
        await answered()
        await assert_eventually(lambda: not server._tasks and not echo.running)


async def test_streams_beyond_the_bound_are_refused_and_may_be_tried_again() -> None:
    async with echoing(streams_max=10) as (echo, address, _server), beside(address), raw_peer(address) as peer:
        peer.h2.remote_settings[3] = 1_000
        peer.h2.remote_settings.acknowledge()
        for number in range(15):
            peer.ask(2 * number + 1, framed(b"wait"))
        await peer.until(lambda: sum(answer.is_ended for answer in peer.answers.values()) == 5)
        refused = [stream_id for stream_id, answer in peer.answers.items() if answer.reset == 7]
        assert refused == [21, 23, 25, 27, 29]
        assert echo.running == 10
        peer.h2.reset_stream(1)
        peer.flush()
        await assert_eventually(lambda: echo.running == 9)
        peer.ask(31, framed(b"again"))
        assert (await peer.answer(31)).data == framed(b"again")


async def test_grpcs_client_waits_for_its_turn_at_the_bound() -> None:
    async with echoing(streams_max=5) as (_, address, _server), open_channel(address) as channel:
        call = raw_unary(channel)
        answers = await asyncio.gather(*(call(b"%d" % number, timeout=10) for number in range(100)))
        assert answers == [b"%d" % number for number in range(100)]


async def test_headers_that_unpack_to_more_than_the_bound_end_their_connection() -> None:
    """As h2 says: what is not unpacked cannot be known by later headers, so this cannot be one stream's error."""
    async with echoing() as (_, address, _server), beside(address) as answered, raw_peer(address) as peer:
        # Remember a field of 4,000 bytes, then name it by one byte, again and again.
        block = b"\x40\x01a\x7f" + b"\xa1\x1e" + b"v" * 4_000 + b"\xbe" * 200
        peer.raw(frame(HEADERS, block, 1, flags=5))
        await peer.closed()
        assert peer.goaway is not None
        assert peer.goaway.error_code == CALM
        await answered()


async def test_headers_that_do_not_end_are_bounded() -> None:
    async with echoing() as (_, address, server), beside(address) as answered, raw_peer(address) as peer:
        connection = next(reversed(server._connections))
        peer.raw(frame(HEADERS, bytes(16_000), 1))
        held = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(60):
                peer.raw(frame(CONTINUATION, bytes(16_000), 1))
                await peer.writer.drain()
                pieces = connection._state.incoming_buffer._headers_buffer
                held = max(held, sum(len(piece.data) for piece in pieces))
                await asyncio.sleep(0)
        await peer.closed()
        assert 0 < held <= limits.HEADER_BLOCK_BYTES_MAX + 2**16
        await answered()


async def test_empty_continuations_are_bounded() -> None:
    async with echoing() as (_, address, _server), beside(address) as answered, raw_peer(address) as peer:
        peer.raw(frame(HEADERS, b"", 1) + 100 * frame(CONTINUATION, b"", 1))
        await peer.closed()
        await answered()


BROKEN: dict[str, bytes] = {
    "data of no stream": frame(DATA, b"x", 5),
    "data of stream 0": frame(DATA, b"x", 0),
    "a frame longer than announced": frame(DATA, bytes(16_385), 1),
    "a push": frame(PUSH_PROMISE, bytes(4), 1, flags=4),
    "an even stream": frame(HEADERS, b"\x83\x86\x84", 2, flags=5),
    "a naked continuation": frame(CONTINUATION, b"", 1, flags=4),
    "a header block in pieces": frame(HEADERS, b"\x83", 3) + frame(PING, bytes(8)),
    "no hpack": frame(HEADERS, b"\xff\xff\xff\xff\xff\xff\xff", 3, flags=5),
    "a short ping": frame(PING, b"short"),
    "padding longer than its frame": frame(DATA, b"\xffx", 1, flags=8),
    "a window that overflows": 2 * frame(WINDOW_UPDATE, b"\x7f\xff\xff\xff"),
    "no increment": frame(WINDOW_UPDATE, bytes(4)),
    "a settings acknowledgement with a body": frame(SETTINGS, bytes(6), 0, flags=1),
    "a setting that is wrong": frame(SETTINGS, b"\0\5\0\0\0\1"),
    "a frame that never ends": b"\xff\xff\xff" + frame(DATA, bytes(100_000), 1)[3:],
    "garbage": bytes(range(200, 256)) * 100,
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_broken_protocol_ends_its_connection_only(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with echoing() as (echo, address, _server), beside(address) as answered, raw_peer(address) as peer:
        peer.begin(1, UNARY)
        peer.raw(BROKEN[kind])
        await peer.closed()
        await answered()
        assert not echo.running
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_a_goaway_of_a_client_leaves_it_the_answers_it_waits_for() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        go_on = asyncio.Event()

        async def push(request: bytes, context: Any) -> None:
            context.send(b"first")
            await go_on.wait()
            context.send(b"second")

        echo.push = push
        peer.ask(1, framed(b""), PUSHED)
        await peer.until(lambda: peer.answers[1].data)
        # Its windows are still its own to open.
        peer.raw(frame(GOAWAY, bytes(8)) + frame(WINDOW_UPDATE, b"\0\0\1\0") + frame(PING, bytes(8)))
        await peer.until(lambda: peer.saw(PingAckReceived))
        go_on.set()
        assert (await peer.answer(1)).data == framed(b"first") + framed(b"second")
        await peer.closed()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/generate HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"PRI * HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        bytes(100_000),
    ],
    ids=["http1", "upgrade", "almost", "tls", "ssh", "zeros"],
)
async def test_who_speaks_something_else_is_closed_at_once(said: bytes) -> None:
    async with echoing() as (_, address, _server), beside(address) as answered:
        async with raw_peer(address, greets=False) as peer:
            peer.raw(said)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(1):
                    while await peer.reader.read(2**16):
                        pass
        await answered()


@pytest.mark.parametrize(
    "said", [b"", b"PRI * HT", PREFACE, PREFACE + b"\0\0"], ids=["nothing", "half", "preface", "more"]
)
async def test_who_says_no_hello_is_not_waited_for(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with echoing() as (_, address, server), beside(address) as answered:
        async with raw_peer(address, greets=False) as peer:
            peer.raw(said)
            await asyncio.wait_for(peer.reader.read(-1), 3)
        await answered()
        assert len(server._connections) == 1


async def test_connections_beyond_the_bound_take_the_place_of_idle_ones() -> None:
    async with echoing(connections_max=100) as (echo, address, server), contextlib.AsyncExitStack() as stack:
        answered = await stack.enter_async_context(beside(address))
        (used,) = server._connections
        held = await stack.enter_async_context(raw_peer(address))
        held.ask(1, framed(b"wait"))
        await assert_eventually(lambda: echo.running == 1)
        waiting = asyncio.create_task(hold_open(answered))
        host, _, port = address.rpartition(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(300)]
        try:
            await asyncio.sleep(0)
            async with open_channel(address) as channel:
                assert await raw_unary(channel)(b"new", timeout=5) == b"new"
            assert len(server._connections) + len(server._handshakes) <= 101
            assert echo.running == 1, "who has a call open stays"
            assert used in server._connections, "who has had one stays before those who never had"
        finally:
            waiting.cancel()
            for one in idle:
                one.close()


async def hold_open(answered: Callable[[], Any]) -> None:
    while True:
        await answered()


async def test_connections_beyond_the_bound_are_refused_where_all_are_in_use() -> None:
    async with echoing(connections_max=3) as (echo, address, _server), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw_peer(address)) for _ in range(3)]
        for peer in peers:
            peer.ask(1, framed(b"wait"))
        await assert_eventually(lambda: echo.running == 3)
        late = await stack.enter_async_context(raw_peer(address, greets=False))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(late.reader.read(1), 3) == b""
        peers[0].h2.reset_stream(1)
        peers[0].flush()
        await assert_eventually(lambda: echo.running == 2)
        async with open_channel(address) as channel:
            assert await raw_unary(channel)(b"new", timeout=5) == b"new"


async def test_unfinished_requests_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_BYTES_MAX", 400_000)
    async with echoing(request_bytes_max=60_000) as (_, address, server), beside(address) as answered:
        async with raw_peer(address) as peer:
            for number in range(20):
                peer.ask(2 * number + 1, framed(b"u" * 10_000, length=50_000), ends=False)
            await peer.until(lambda: sum(answer.is_ended for answer in peer.answers.values()) == 11)
            refused = [answer for answer in peer.answers.values() if answer.is_ended]
            assert {answer.status for answer in refused} == {8}
            assert server.held.bytes <= server.held.bytes_max // limits.HELD_SHARE
            await answered()
        await assert_eventually(lambda: server.held.bytes == 0)


async def test_a_request_that_stops_in_the_middle_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PING_AFTER_S", 0.2)
    monkeypatch.setattr(limits, "PING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(limits, "PROGRESS_TIMEOUT_S", 0.3)
    async with echoing() as (_, address, server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"half", length=50), ends=False)
        peer.begin(3, UNARY)
        peer.ask(5, framed(b"wait"))
        for stream_id in (1, 3):
            answer = await peer.answer(stream_id)
            assert answer.status == 3
            assert "did not go on" in answer.message
        assert server.held.bytes == 0
        assert not peer.answers[5].is_ended


async def test_requests_that_are_not_read_stop_at_the_window() -> None:
    """And go on when they are: what is not read is not given back to the client."""
    async with echoing() as (echo, address, server), beside(address) as answered, raw_peer(address) as peer:
        gate = asyncio.Event()
        chat = echo.chat

        async def gated(requests: Any, context: Any) -> Any:
            async def slow() -> Any:
                async for request in requests:
                    await gate.wait()
                    yield request

            async for response in chat(slow(), context):
                yield response

        server.methods.find(CHAT).behavior = gated  # type: ignore[union-attr]
        peer.begin(1, CHAT)
        sent = 0
        await peer.until(lambda: peer.h2.local_flow_control_window(1) > 2**16)
        while peer.h2.local_flow_control_window(1) >= 10_005:
            peer.h2.send_data(1, framed(b"c" * 10_000))
            peer.flush()
            sent += 1
            await asyncio.sleep(0)
        await answered()
        peer.h2.ping(bytes(8))
        peer.flush()
        await peer.until(lambda: peer.saw(PingAckReceived))
        assert peer.h2.local_flow_control_window(1) < 10_005, "nothing was given back"
        gate.set()
        peer.h2.end_stream(1)
        peer.flush()
        answer = await peer.answer(1)
        assert answer.data == sent * framed(b"c" * 10_000)


async def test_more_small_requests_than_can_be_kept_end_their_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUED_REQUESTS_MAX", 100)
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.begin(1, CHAT)
        peer.h2.send_data(1, 2_000 * framed(b""))
        peer.flush()
        assert (await peer.answer(1)).status == 8


async def test_memory_does_not_grow_with_what_has_been_refused() -> None:
    """Ten thousand calls of which nothing came, on few connections."""
    process = psutil.Process()
    async with echoing() as (_, address, _server), beside(address):

        async def wave(count: int) -> None:
            async with raw_peer(address) as peer:
                for number in range(count):
                    peer.ask(2 * number + 1, framed(b"x"), "/test.Echo/Nothing")
                    peer.h2.outbound_flow_control_window = 65_535
                    if number % 50 == 0:
                        await peer.answer(2 * number + 1)
                        peer.answers.clear()
                        peer.events.clear()

        await wave(1_000)
        before = process.memory_info().rss
        for _ in range(5):
            await wave(2_000)
        assert process.memory_info().rss - before < 20 * 2**20


async def test_a_response_to_a_client_that_left_at_once_does_not_affect_others() -> None:
    """h2 has closed the stream by the time its request is looked at."""
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        await peer.until(lambda: peer.answers[1].data)
        for number, path in enumerate((UNARY, "/test.Echo/Nothing", CHAT), 1):
            peer.h2.send_headers(2 * number + 1, fields(path))
            peer.h2.reset_stream(2 * number + 1)
        peer.flush()
        peer.ask(11, framed(b"next"))
        assert (await peer.answer(11)).data == framed(b"next")
        assert not peer.answers[1].is_ended


def fields(path: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "test"),
        (":path", path),
        ("content-type", "application/grpc"),
    ]


async def test_grpc_health_checks_beside_an_attack() -> None:
    async with echoing() as (_, address, _server), open_channel(address) as channel:
        watch = raw_stream(channel, "/grpc.health.v1.Health/Watch")(b"")
        assert await watch.read() == b"\x08\x01"
        async with raw_peer(address) as peer:
            await flood(peer, FLOODS["pings"](), 20)
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        watch.cancel()
