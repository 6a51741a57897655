"""Calls on the server on h2, by gRPC's own client and by one that breaks its rules: one stream's error is its own."""

from __future__ import annotations

import asyncio
import base64
import gzip
import re
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.rpc.channels import open_channel
from tandem.rpc.http2.limits import SOCKET_BUFFER_BYTES, STREAM_UNSENT_BYTES_MAX, TURN_BYTES_MAX
from tandem.testing.eventually import assert_eventually
from tests.wire.support.http2_peer import (
    LARGE,
    PUSHED,
    STREAM,
    UNARY,
    beside,
    echoing,
    framed,
    raw_chat,
    raw_peer,
    raw_stream,
    raw_unary,
)

INVALID_ARGUMENT, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL = 3, 4, 12, 13


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def test_every_kind_of_method_answers() -> None:
    async with echoing() as (_, address, _server), open_channel(address) as channel:
        assert await raw_unary(channel)(b"one") == b"one"
        assert await raw_unary(channel)(b"") == b""
        assert [part async for part in raw_stream(channel, STREAM)(b"many")] == [b"many"] * 3
        assert [part async for part in raw_stream(channel, PUSHED)(b"pushed")] == [b"pushed"]
        chat = raw_chat(channel)(iter([b"a", b"b" * 3 * 2**20, b"c"]))
        assert [part async for part in chat] == [b"a", b"b" * 3 * 2**20, b"c"]


async def test_a_request_and_a_response_larger_than_any_window_arrive_whole() -> None:
    body = bytes(range(256)) * (12 * 4096)
    async with echoing() as (_, address, _server), open_channel(address) as channel:
        calls = [raw_unary(channel)(bytes([n]) + body) for n in range(3)]
        for n, answer in enumerate(await asyncio.gather(*calls)):
            assert answer == bytes([n]) + body


async def test_headers_that_are_set_early_are_asked_for_late_and_sent_with_an_error_too() -> None:
    reads = iter(("1", "2", "3"))

    async def push(request: bytes, context: Any) -> None:
        context.set_initial_metadata(lambda: [("x-left", next(reads))])
        if request == b"fail":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
        if request == b"now":
            await context.send_initial_metadata((("x-first", "1"),))
        context.send(b"a")
        context.send(b"b")

    async with echoing() as (echo, address, _server), open_channel(address) as channel:
        echo.push = push
        call = raw_stream(channel, PUSHED)(b"")
        assert [part async for part in call] == [b"a", b"b"]
        assert dict(await call.initial_metadata())["x-left"] == "1"
        call = raw_stream(channel, PUSHED)(b"now")
        assert [part async for part in call] == [b"a", b"b"]
        assert {"x-left": "2", "x-first": "1"}.items() <= dict(await call.initial_metadata()).items()
        failed = await failure_of(raw_stream(channel, PUSHED)(b"fail").read())
        assert dict(failed.trailing_metadata())["x-left"] == "3", "of the one block that such a response has"


async def test_metadata_arrives_and_is_sent_back() -> None:
    async def push(request: bytes, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        assert metadata["x-text"] == "text, with a comma"
        assert metadata["x-raw-bin"] == bytes(range(256))
        assert not {"te", "content-type", ":path", "grpc-timeout"} & set(metadata)
        assert 60 < context.time_remaining() <= 101, "the client rounds it up"
        assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", context.peer())
        await context.send_initial_metadata((("x-first", "1"), ("x-first-bin", b"\x00\xff")))
        context.set_trailing_metadata((("x-last", "2"), ("x-last-bin", b"\xfe")))
        context.send(b"done")

    async with echoing() as (echo, address, _server), open_channel(address) as channel:
        echo.push = push
        sent = (("x-text", "text, with a comma"), ("x-raw-bin", bytes(range(256))))
        call = raw_stream(channel, PUSHED)(b"", metadata=sent, timeout=100)
        assert [part async for part in call] == [b"done"]
        first, last = dict(await call.initial_metadata()), dict(await call.trailing_metadata())
        assert (first["x-first"], first["x-first-bin"]) == ("1", b"\x00\xff")
        assert (last["x-last"], last["x-last-bin"]) == ("2", b"\xfe")


async def test_metadata_that_cannot_be_sent_ends_its_call_only() -> None:
    async def push(request: bytes, context: Any) -> None:
        context.set_trailing_metadata((("x-broken", request.decode("latin-1")),))

    async with echoing() as (echo, address, _server), beside(address), open_channel(address) as channel:
        echo.push = push
        for value in (b"two\r\nlines", b"caf\xe9", b" led by a space"):
            failure = await failure_of(raw_stream(channel, PUSHED)(value).read())
            assert failure.code() is grpc.StatusCode.INTERNAL
            assert value.decode("latin-1") not in (failure.details() or "")
        echo.push = lambda request, context: context.abort(grpc.StatusCode.ABORTED, "m", (("x-long", "v" * 2**15),))
        assert (await failure_of(raw_stream(channel, PUSHED)(b"").read())).code() is grpc.StatusCode.INTERNAL


@given(st.text(max_size=60))
@settings(max_examples=30, deadline=None)
async def test_any_message_of_a_status_arrives(text: str) -> None:
    async with echoing() as (echo, address, _server), open_channel(address) as channel:
        echo.push = lambda request, context: context.abort(grpc.StatusCode.DATA_LOSS, text)
        failure = await failure_of(raw_stream(channel, PUSHED)(b"").read())
        assert failure.code() is grpc.StatusCode.DATA_LOSS
        assert failure.details() == text


async def test_a_status_may_come_after_messages_or_alone() -> None:
    async def push(request: bytes, context: Any) -> None:
        if request:
            context.send(request)
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        echo.push = push
        peer.ask(1, framed(b""), PUSHED)
        peer.ask(3, framed(b"first"), PUSHED)
        alone, after = await peer.answer(1), await peer.answer(3)
        assert (alone.headers["grpc-status"], alone.headers[":status"], alone.trailers) == ("5", "200", {})
        assert (bytes(after.data), after.trailers["grpc-status"]) == (framed(b"first"), "5")
        assert "grpc-status" not in after.headers


async def test_a_defect_of_a_handler_is_internal_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async with echoing() as (_, address, _server), beside(address), open_channel(address) as channel:
        failure = await failure_of(raw_unary(channel)(b"fail"))
        assert failure.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (failure.details() or "")
    assert [record.getMessage() for record in caplog.records] == [
        "bug in this service in the handler of /test.Echo/Unary: the call fails with an internal error, others do not"
    ]


async def test_a_deadline_is_the_servers_to_keep() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), UNARY, ("grpc-timeout", "50m"))
        assert (await peer.answer(1)).status == DEADLINE_EXCEEDED
        peer.ask(3, framed(b"wait"), STREAM, ("grpc-timeout", "50m"))
        streamed = await peer.answer(3)
        assert (streamed.status, bytes(streamed.data)) == (DEADLINE_EXCEEDED, 3 * framed(b"wait"))
        peer.begin(5, UNARY, ("grpc-timeout", "50m"))
        assert (await peer.answer(5)).status == DEADLINE_EXCEEDED
        await assert_eventually(lambda: echo.cancelled == 2 and not echo.running)


async def test_a_client_that_leaves_cancels_its_handler_and_is_sent_nothing() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        for stream_id, path in ((1, UNARY), (3, STREAM)):
            peer.ask(stream_id, framed(b"wait"), path)
        await peer.until(lambda: len(peer.answers[3].data) == 3 * len(framed(b"wait")))
        await assert_eventually(lambda: echo.running == 2)
        for stream_id in (1, 3):
            peer.h2.reset_stream(stream_id, 8)
        peer.flush()
        await assert_eventually(lambda: echo.cancelled == 2 and not echo.running)
        peer.ask(5, framed(b"next"))
        assert (await peer.answer(5)).data == framed(b"next")
        assert not peer.answers[1].headers
        assert not peer.answers[3].is_ended


async def test_a_lost_connection_cancels_its_handlers() -> None:
    async with echoing() as (echo, address, _server):
        async with raw_peer(address) as peer:
            peer.ask(1, framed(b"wait"))
            await assert_eventually(lambda: echo.running == 1)
        await assert_eventually(lambda: echo.cancelled == 1 and not echo.running)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "holds no message"),
        (framed(b"one") + framed(b"two"), "more than one message"),
        (framed(b"one") + b"\x00", "more than one message"),
        (framed(b"short", length=50), "ended in the middle"),
        (b"\x00\x00", "ended in the middle"),
        (b"\x02" + framed(b"flag")[1:], "not framed"),
        (framed(b"not gzip", compressed=True), "not compressed with gzip"),
        (framed(gzip.compress(b"whole", mtime=0)[:-3], compressed=True), "not compressed with gzip"),
        (framed(gzip.compress(b"whole", mtime=0) + b"more", compressed=True), "not compressed with gzip"),
    ],
)
async def test_a_request_that_is_not_one_message_is_refused(body: bytes, says: str) -> None:
    async with echoing() as (echo, address, _server), beside(address), raw_peer(address) as peer:
        for stream_id, cut in ((1, len(body)), (3, 1), (5, 6)):
            peer.begin(stream_id, UNARY, ("grpc-encoding", "gzip"))
            peer.h2.send_data(stream_id, body[:cut], end_stream=cut >= len(body))
            if cut < len(body) and peer.h2.streams[stream_id].open:
                peer.h2.send_data(stream_id, body[cut:], end_stream=True)
            peer.flush()
            answer = await peer.answer(stream_id)
            assert answer.status == INVALID_ARGUMENT
            assert says in answer.message
        assert echo.started == 1, "the client beside has asked once so far"


async def test_a_message_that_says_it_is_too_long_is_refused_before_it_comes() -> None:
    async with echoing(request_bytes_max=1_000) as (_, address, server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"only the beginning", length=1_001), ends=False)
        answer = await peer.answer(1)
        assert answer.status == INVALID_ARGUMENT
        assert "1001 bytes are more than 1000" in answer.message
        assert server.held.bytes == 0
        peer.ask(3, framed(b"x" * 1_000))
        assert (await peer.answer(3)).data == framed(b"x" * 1_000)


async def test_compressed_requests_are_unpacked_to_their_bound_and_no_further() -> None:
    async with echoing(request_bytes_max=2**20) as (echo, address, _server), beside(address), raw_peer(address) as peer:
        for stream_id, size in ((1, 10), (3, 2**20)):
            peer.ask(stream_id, framed(gzip.compress(b"z" * size), compressed=True), UNARY, ("grpc-encoding", "gzip"))
            answer = await peer.answer(stream_id)
            assert (answer.status, len(answer.data)) == (0, size + 5)
        before = echo.started
        for stream_id, size in ((5, 2**20 + 1), (7, 2**23)):
            peer.ask(stream_id, framed(bomb(size), compressed=True), UNARY, ("grpc-encoding", "gzip"))
            answer = await peer.answer(stream_id)
            assert answer.status == INVALID_ARGUMENT
            assert "more than 1048576" in answer.message
        assert echo.started == before


def bomb(size: int) -> bytes:
    return gzip.compress(bytes(size), 9)


async def test_grpcs_own_compression_is_understood() -> None:
    async with echoing() as (_, address, _server), open_channel(address) as channel:
        call = raw_unary(channel)
        assert await call(b"g" * 100_000, compression=grpc.Compression.Gzip) == b"g" * 100_000
        failure = await failure_of(call(b"d" * 100_000, compression=grpc.Compression.Deflate))
        assert failure.code() is grpc.StatusCode.UNIMPLEMENTED
        chat = raw_chat(channel)(iter([b"a" * 9_999, b"b" * 9_999]), compression=grpc.Compression.Gzip)
        assert [part async for part in chat] == [b"a" * 9_999, b"b" * 9_999]


async def test_an_unknown_encoding_is_refused_with_the_known_ones() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"), UNARY, ("grpc-encoding", "br"))
        answer = await peer.answer(1)
        assert answer.status == UNIMPLEMENTED
        assert answer.headers["grpc-accept-encoding"] == "identity,gzip"


async def test_a_compressed_message_without_an_encoding_is_refused() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(gzip.compress(b"x"), compressed=True))
        assert (await peer.answer(1)).status == INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["/test.Echo/Nothing", "/nothing", "/", "", "*", "/test.Echo/Unary/", "\xff/\xfe"])
async def test_an_unknown_method_is_unimplemented(path: str) -> None:
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"), path or "/")
        assert (await peer.answer(1)).status == UNIMPLEMENTED


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (("content-type", "application/json"), "415"),
        (("content-type", "application/grpc-web"), "415"),
        (("content-type", "application/grpcx"), "415"),
        (("content-type", ""), "415"),
        ((":method", "GET"), "405"),
        ((":method", "PUT"), "405"),
        (("content-type", "application/grpc+proto"), "200"),
        (("content-type", "application/grpc;charset=utf-8"), "200"),
        (("te", ""), "200"),
    ],
)
async def test_what_is_no_call_of_grpc_gets_an_answer_of_http(field: tuple[str, str], status: str) -> None:
    async with echoing() as (_, address, _server), beside(address), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"), UNARY, field)
        answer = await peer.answer(1)
        assert answer.headers[":status"] == status


@pytest.mark.parametrize(
    "field",
    [
        ("X-Upper", "case"),
        ("with space", "x"),
        ("x-line", "a\r\nb"),
        ("x-null", "a\x00b"),
        (":unknown", "x"),
        (":status", "200"),
        (":method", ""),
        (":path", ""),
    ],
)
async def test_headers_that_are_no_http2_reset_their_stream_only(field: tuple[str, str]) -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        await peer.until(lambda: peer.answers[1].data)
        peer.begin(3, UNARY, field, ends=True)
        assert (await peer.answer(3)).reset == 1
        peer.ask(5, framed(b"next"))
        assert (await peer.answer(5)).data == framed(b"next")
        assert not peer.answers[1].is_ended


@pytest.mark.parametrize("timeout", ["5", "s", "123456789m", "-1S", "1.5S", "9H9"])
async def test_a_timeout_that_is_none_is_refused(timeout: str) -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"), UNARY, ("grpc-timeout", timeout))
        answer = await peer.answer(1)
        assert answer.status == INVALID_ARGUMENT
        assert answer.message.startswith("grpc-timeout")


async def test_the_longest_timeout_is_none_at_all() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"x"), UNARY, ("grpc-timeout", "99999999H"))
        assert (await peer.answer(1)).status == 0
        assert echo.contexts[-1].time_remaining() is None


async def test_metadata_that_is_not_base64_is_refused_where_it_is_read() -> None:
    async def push(request: bytes, context: Any) -> None:
        context.send(dict(context.invocation_metadata())["x-bin"])

    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        echo.push = push
        peer.ask(1, framed(b"x"), PUSHED, ("x-bin", "!!"))
        assert (await peer.answer(1)).status == INVALID_ARGUMENT
        for stream_id, value in ((3, "AP8"), (5, "AP8=")):
            peer.ask(stream_id, framed(b"x"), PUSHED, ("x-bin", value))
            assert (await peer.answer(stream_id)).data == framed(b"\x00\xff")


async def test_large_metadata_is_refused_and_its_neighbours_are_not() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        await peer.until(lambda: peer.answers[1].data)
        for stream_id, size in ((3, 66_000), (5, 200_000)):
            peer.ask(stream_id, framed(b"x"), UNARY, ("x-large", "v" * size))
            answer = await peer.answer(stream_id)
            assert answer.status == INVALID_ARGUMENT
            assert "are more than 65536" in answer.message
        peer.ask(7, framed(b"x"), UNARY, ("x-large", "v" * 60_000))
        assert (await peer.answer(7)).data == framed(b"x")
        assert not peer.answers[1].is_ended


async def test_details_of_a_status_are_carried_in_base64() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, b"")
        answer = await peer.answer(1)
        details = base64.b64decode(answer.headers["grpc-status-details-bin"] + "==")
        assert b"INVALID_REQUEST" in details


class Pusher:
    """A handler that sends as long as it may, and counts how often it was called back."""

    def __init__(self, piece: bytes, total: int) -> None:
        self.piece, self.left, self.woken = piece, total, 0
        self.unsent_max = 0
        self.done = asyncio.Event()

    async def __call__(self, request: bytes, context: Any) -> None:
        def fill() -> None:
            while self.left and context.writable:
                context.send(self.piece)
                self.left -= 1
                self.unsent_max = max(self.unsent_max, context.unsent_bytes)
            if not self.left:
                self.done.set()

        def woken() -> None:
            self.woken += 1
            assert context.writable
            fill()

        context.on_writable(woken)
        fill()
        await self.done.wait()


async def test_a_client_that_does_not_read_holds_its_stream_and_no_other() -> None:
    piece = b"p" * 1_000
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        pusher = echo.push = Pusher(piece, 2_000)
        peer.gives_back = False
        peer.ask(1, framed(b""), PUSHED)
        await peer.until(lambda: len(peer.answers[1].data) >= 65_000)
        await assert_eventually(lambda: echo.contexts[0].unsent_bytes > STREAM_UNSENT_BYTES_MAX)
        assert pusher.unsent_max <= STREAM_UNSENT_BYTES_MAX + len(framed(piece))
        assert not pusher.woken
        # The window of the connection is used up as well; what needs none still passes.
        peer.ask(3, framed(b""), "/test.Echo/Nothing")
        assert (await peer.answer(3)).status == UNIMPLEMENTED
        peer.gives_back = True
        peer.h2.increment_flow_control_window(2**16, 1)
        peer.h2.increment_flow_control_window(2**20)
        peer.flush()
        answer = await peer.answer(1)
        assert answer.data == 2_000 * framed(piece)
        assert answer.status == 0
        assert pusher.woken > 0
        assert pusher.unsent_max <= STREAM_UNSENT_BYTES_MAX + len(framed(piece))


async def test_a_generator_waits_for_a_client_that_does_not_read_and_is_closed_when_it_leaves() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        peer.gives_back = False
        peer.ask(1, framed(LARGE), STREAM)
        await peer.until(lambda: len(peer.answers[1].data) >= 65_000)
        assert echo.yielded < 30
        assert echo.running == 1
        peer.h2.reset_stream(1)
        peer.flush()
        await assert_eventually(lambda: not echo.running)
        assert echo.yielded < 30


async def test_a_generator_goes_on_when_its_client_reads() -> None:
    async with echoing() as (_, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(LARGE), STREAM)
        answer = await peer.answer(1)
        assert answer.data == 1_000 * framed(LARGE)
        assert answer.status == 0


async def test_a_socket_that_takes_nothing_holds_what_is_sent_whatever_its_windows_allow() -> None:
    """A peer may open all windows and read nothing. What it makes the server keep is bounded all the same."""
    piece, count = b"s" * 4_000, 5_000
    async with echoing() as (echo, address, server), beside(address), raw_peer(address, _4=2**31 - 1) as peer:
        connection = next(reversed(server._connections))
        peer.h2.increment_flow_control_window(2**31 - 2**17)
        pusher = echo.push = Pusher(piece, count)
        peer.ask(1, framed(b""), PUSHED)
        await assert_eventually(lambda: connection._sender.is_paused and not echo.contexts[-1].writable)
        assert pusher.left
        kept = connection._transport.get_write_buffer_size()
        assert kept <= SOCKET_BUFFER_BYTES + 2 * TURN_BYTES_MAX
        assert pusher.unsent_max <= STREAM_UNSENT_BYTES_MAX + len(framed(piece))
        answer = await peer.answer(1)
        assert answer.data == count * framed(piece)
        assert pusher.woken


async def test_an_error_in_a_callback_ends_its_call_only(caplog: pytest.LogCaptureFixture) -> None:
    async def push(request: bytes, context: Any) -> None:
        def broken() -> None:
            raise ValueError("a secret")

        context.on_writable(broken)
        context.send(b"p" * 200_000)
        await asyncio.Event().wait()

    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"), STREAM)
        echo.push = push
        peer.ask(3, framed(b""), PUSHED)
        assert (await peer.answer(3)).status == INTERNAL
        peer.ask(5, framed(b"next"))
        assert (await peer.answer(5)).data == framed(b"next")
        assert not peer.answers[1].is_ended
        await assert_eventually(lambda: echo.running == 1)


async def test_windows_that_shrink_and_grow_change_nothing_of_what_arrives() -> None:
    """Settings of a peer change the window of every stream, below nothing too."""
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        echo.push = Pusher(b"w" * 700, 500)
        peer.gives_back = False
        peer.ask(1, framed(b""), PUSHED)
        await peer.until(lambda: len(peer.answers[1].data) > 30_000)
        for size in (0, 10, 3, 2**16):
            peer.h2.update_settings({4: size})
            peer.flush()
            await peer.read()
        peer.gives_back = True
        peer.h2.increment_flow_control_window(2**20)
        peer.h2.increment_flow_control_window(2**20, 1)
        peer.flush()
        assert (await peer.answer(1)).data == 500 * framed(b"w" * 700)


async def test_a_client_may_change_what_its_decoder_remembers() -> None:
    """The next block has to begin with it; h2's client refuses one that does not."""
    async with echoing() as (_, address, _server), raw_peer(address, _1=0) as peer:
        peer.ask(1, framed(b"first"))
        assert (await peer.answer(1)).status == 0
        for stream_id, size in ((3, 100), (5, 0), (7, 4_096)):
            peer.h2.update_settings({1: size})
            peer.ask(stream_id, framed(b"x"), UNARY if stream_id != 5 else "/test.Echo/Nothing")
            assert (await peer.answer(stream_id)).status == (0 if stream_id != 5 else UNIMPLEMENTED)
            assert peer.h2.decoder.header_table_size <= size


async def test_messages_of_one_turn_leave_in_one_write() -> None:
    async def push(request: bytes, context: Any) -> None:
        for number in range(20):
            context.send(b"%d" % number)

    async with echoing() as (echo, address, server), raw_peer(address) as peer:
        peer.ask(1, framed(b"all settings have been exchanged"))
        await peer.answer(1)
        echo.push = push
        writes: list[int] = []
        connection = next(iter(server._connections))
        transport, write = connection._transport, connection._transport.write

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                writes.append(len(data))
                write(data)

        connection._sender._transport = Counting()  # type: ignore[assignment]
        peer.ask(3, framed(b""), PUSHED)
        answer = await peer.answer(3)
        assert answer.data == b"".join(framed(b"%d" % number) for number in range(20))
        assert len(writes) == 1
