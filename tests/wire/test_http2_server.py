"""The server on h2 from its first connection to its end: keepalive, TLS, sockets from elsewhere, and the stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from h2.events import PingReceived

from tandem.client import calls as clients
from tandem.client.health_calls import HealthWatch
from tandem.errors import InvalidRequest, StartError
from tandem.rpc.channels import open_channel
from tandem.rpc.http2 import limits
from tandem.rpc.http2.server import Http2RpcServer
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls
from tests.wire.support.http2_peer import (
    PUSHED,
    STREAM,
    Echo,
    RawPeer,
    beside,
    echoing,
    framed,
    raw_peer,
    raw_stream,
    raw_unary,
)


@pytest.fixture
def quick_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PING_AFTER_S", 0.2)
    monkeypatch.setattr(limits, "PING_TIMEOUT_S", 0.2)
    monkeypatch.setattr("tandem.rpc.http2.keepalive.LAG_S", 0.1)


@pytest.mark.usefixtures("quick_keepalive")
async def test_a_client_that_vanished_loses_its_calls() -> None:
    """Its socket stays open, as that of a machine that lost its power."""
    async with echoing() as (echo, address, server), beside(address) as answered, raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"))
        await assert_eventually(lambda: echo.running == 1)
        await assert_eventually(lambda: echo.cancelled == 1 and not echo.running, within_s=3)
        await assert_eventually(lambda: len(server._connections) == 1)
        await answered()


@pytest.mark.usefixtures("quick_keepalive")
async def test_a_client_that_is_silent_but_there_keeps_its_calls() -> None:
    async with echoing() as (echo, address, _server), raw_peer(address) as peer:
        peer.ask(1, framed(b"wait"))
        await peer.until(lambda: peer.saw(PingReceived) >= 5)
        assert echo.running == 1


@pytest.mark.usefixtures("quick_keepalive")
async def test_a_loop_that_was_busy_does_not_take_it_for_silence() -> None:
    """What has come in the meantime is read before a peer is given up."""
    async with echoing() as (echo, address, _server), open_channel(address) as channel:
        stream = raw_stream(channel, STREAM)(b"wait")
        assert await stream.read() == b"wait"
        for _ in range(3):
            await asyncio.sleep(0.25)
            time.sleep(0.7)  # noqa: ASYNC251  # holds the loop
        assert await raw_unary(channel)(b"x", timeout=5) == b"x"
        assert not echo.cancelled
        stream.cancel()


async def test_clients_with_grpcs_keepalive_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [("grpc.keepalive_time_ms", 1_000), ("grpc.keepalive_timeout_ms", 500)]
    options += [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)]
    pings = 0
    on_ping = limits.Budget.spend

    def counted(self: limits.Budget, *arguments: Any) -> bool:
        nonlocal pings
        pings += 1
        return on_ping(self, *arguments)

    async with echoing() as (_, address, _server), grpc.aio.insecure_channel(address, options=options) as channel:
        stream = raw_stream(channel, STREAM)(b"wait")
        assert await stream.read() == b"wait"
        monkeypatch.setattr(limits.Budget, "spend", counted)
        await assert_eventually(lambda: pings, lambda count: count >= 2, within_s=10)
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        stream.cancel()


async def test_a_stop_lets_running_calls_end() -> None:
    async with echoing() as (echo, address, server), open_channel(address) as channel:
        go_on = asyncio.Event()

        async def push(request: bytes, context: Any) -> None:
            context.send(b"first")
            await go_on.wait()
            context.send(b"last")

        echo.push = push
        stream = raw_stream(channel, PUSHED)(b"")
        assert await stream.read() == b"first"
        stopping = asyncio.create_task(server.stop(10))
        await assert_eventually(lambda: server.is_stopping)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await raw_unary(channel)(b"late", timeout=2)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        go_on.set()
        assert (await stream.read(), await stream.read()) == (b"last", grpc.aio.EOF)
        await asyncio.wait_for(stopping, 2)
        await server.stop(0)


async def test_a_stop_cancels_what_does_not_end_and_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.rpc.http2.server.FLUSH_TIMEOUT_S", 0.01)
    async with echoing() as (echo, address, server), open_channel(address) as channel:
        ended = False

        async def push(request: bytes, context: Any) -> None:
            nonlocal ended
            context.send(b"first")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.2)
                ended = True

        echo.push = push
        calls = [raw_stream(channel, PUSHED)(b"") for _ in range(3)]
        assert [await call.read() for call in calls] == [b"first"] * 3
        async with asyncio.timeout(3):
            await asyncio.gather(server.stop(0.1), server.stop(0.1))
        assert ended
        assert not echo.running
        assert not server._connections
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stop_does_not_wait_for_a_client_that_does_not_read() -> None:
    async with echoing() as (echo, address, server), raw_peer(address) as peer:

        async def push(request: bytes, context: Any) -> None:
            context.send(b"p" * 2**20)

        echo.push = push
        peer.gives_back = False
        peer.ask(1, framed(b""), PUSHED)
        await peer.until(lambda: len(peer.answers[1].data) > 60_000)
        assert echo.started == 1
        assert not echo.running
        async with asyncio.timeout(3):
            await server.stop(0.1)
        await peer.closed()
        assert peer.answers[1].reset is not None
        assert not peer.answers[1].trailers


async def test_health_is_reported_at_each_change_and_for_each_service() -> None:
    async with echoing() as (_, address, server), open_channel(address) as channel:
        watch = HealthWatch(channel, waits=False)
        assert await watch.read()
        assert await clients.is_serving(address, "test.Echo")
        await server.set_serving(False)
        assert not await watch.read()
        assert not await clients.is_serving(address, "test.Echo")
        with pytest.raises(InvalidRequest):
            await clients.is_serving(address, "test.Unknown")
        watch.close()


async def test_a_server_that_stopped_before_it_served() -> None:
    server = Http2RpcServer()
    server.bind("127.0.0.1", 0)
    port = server.port
    with pytest.raises(StartError, match="the port is in use"):
        Http2RpcServer().bind("127.0.0.1", port)
    await server.stop(0)
    again = Http2RpcServer()
    again.bind("127.0.0.1", port)
    await again.stop(0)
    await Http2RpcServer().stop(0)


async def test_clients_wait_from_bind_to_serve() -> None:
    server = Http2RpcServer()
    server.bind("127.0.0.1", 0)
    asking = asyncio.create_task(clients.is_serving(f"127.0.0.1:{server.port}"))
    await asyncio.sleep(0.1)
    await server.serve()
    assert await asking is False
    await server.stop(0)


@pytest.mark.parametrize("host", ["[::1]", "::1", "localhost", "0.0.0.0"])
async def test_every_spelling_of_an_address_is_listened_on(host: str) -> None:
    server = Http2RpcServer()
    try:
        await server.start(host, 0)
    except StartError:
        assert ":" in host, "this machine has no IPv6"
        pytest.skip("no IPv6 here")
    try:
        name = "[::1]" if ":" in host else "127.0.0.1"
        assert not await clients.is_serving(f"{name}:{server.port}")
    finally:
        await server.stop(0)


async def test_a_socket_that_was_accepted_elsewhere_is_served() -> None:
    """The server has no listener of its own."""
    echo = Echo()
    server = Http2RpcServer([("test.Echo", echo.add)])
    await server.serve()
    with socket.create_server(("127.0.0.1", 0)) as parent:
        parent.setblocking(False)
        loop = asyncio.get_running_loop()

        async def hand_over() -> None:
            while True:
                connection, _ = await loop.sock_accept(parent)
                server.serve_socket(connection)

        handing = asyncio.create_task(hand_over())
        async with open_channel(f"127.0.0.1:{parent.getsockname()[1]}") as channel:
            assert await raw_unary(channel)(b"handed") == b"handed"
        handing.cancel()
    await server.stop(0)
    ours, theirs = socket.socketpair()
    server.serve_socket(ours)
    assert ours.fileno() == -1, "a server that has stopped takes no connection"
    theirs.close()


async def test_peers_of_a_local_socket_are_served_too() -> None:
    async with echoing() as (echo, _address, server):
        ours, theirs = socket.socketpair()
        server.serve_socket(ours)
        async with raw_peer_over(theirs) as peer:
            peer.ask(1, framed(b"local"))
            assert (await peer.answer(1)).data == framed(b"local")
        assert echo.contexts[0].peer() == "unix:"


@contextlib.asynccontextmanager
async def raw_peer_over(connection: socket.socket) -> Any:
    peer = RawPeer(*await asyncio.open_connection(sock=connection))
    peer.h2.initiate_connection()
    peer.flush()
    await peer.read()
    yield peer
    peer.writer.close()
    await peer.writer.wait_closed()


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    issue_all(tmp_path / "certs")
    return tmp_path / "certs"


def client_context(certs: Path, *protocols: str) -> ssl.SSLContext:
    own = Tls.in_directory(certs, "client")
    context = ssl.create_default_context(cafile=str(own.ca))
    context.load_cert_chain(own.cert, own.key)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


@pytest.mark.parametrize("protocols", [(), ("http/1.1",)], ids=["none", "http1"])
async def test_with_tls_a_client_must_say_that_it_speaks_http2(certs: Path, protocols: tuple[str, ...]) -> None:
    tls = Tls.in_directory(certs, "frontend")
    async with echoing(tls=tls) as (_, address, server):
        host, _, port = address.rpartition(":")
        context = client_context(certs, *protocols)
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(1), 3) == b""
        writer.close()
        assert await clients.is_serving(address, tls=Tls.in_directory(certs, "client"))
        await assert_eventually(lambda: not server._connections)


async def test_a_handshake_that_does_not_go_on_is_not_waited_for(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with echoing(tls=Tls.in_directory(certs, "frontend")) as (_, address, server):
        host, _, port = address.rpartition(":")
        for said in (b"", b"\x16\x03\x01\x02\x00\x01"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(-1), 3) is not None
            writer.close()
        await assert_eventually(lambda: not server._handshakes)
        assert await clients.is_serving(address, tls=Tls.in_directory(certs, "client"))


async def test_large_answers_pass_through_tls(certs: Path) -> None:
    async with (
        echoing(tls=Tls.in_directory(certs, "frontend")) as (_, address, _server),
        open_channel(address, Tls.in_directory(certs, "client")) as channel,
    ):
        body = bytes(range(256)) * 20_000
        assert await raw_unary(channel)(body) == body


async def test_an_unexpected_error_ends_its_connection_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with echoing() as (echo, address, server), beside(address) as answered, raw_peer(address) as peer:
        connection = next(reversed(server._connections))
        peer.ask(1, framed(b"wait"))
        await assert_eventually(lambda: echo.running == 1)

        def broken(data: bytes) -> None:
            raise RuntimeError("no h2 does that")

        monkeypatch.setattr(connection._state, "receive_data", broken)
        with caplog.at_level(logging.ERROR):
            peer.ask(3, framed(b"x"))
            await peer.closed()
        assert [record.getMessage().partition(" from ")[0] for record in caplog.records] == [
            "bug in this server: closing the connection"
        ]
        await answered()
        await assert_eventually(lambda: echo.cancelled == 1 and not echo.running)
