"""A client of HTTP/2 that can do what no library lets it: h2 for the framing, and a socket for the rest.

And a service of bytes for it: `Echo` under /test.Echo, whose handlers a test can hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from tandem.rpc.channels import open_channel
from tandem.rpc.http2.server import Http2RpcServer

UNARY, STREAM, PUSHED, CHAT = "/test.Echo/Unary", "/test.Echo/Stream", "/test.Echo/Pushed", "/test.Echo/Chat"
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
LARGE = b"l" * 10_000
"""Asked for with this, Stream answers with it a thousand times."""
WITHIN_S = 5.0


def framed(message: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A message as gRPC carries it; its prefix may lie."""
    return bytes([compressed]) + (len(message) if length is None else length).to_bytes(4, "big") + message


class Echo:
    """Handlers of bytes. What they do can be replaced by a test."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []
        self.started = 0
        self.ended = 0
        self.cancelled = 0
        self.yielded = 0
        self.push: Callable[[bytes, Any], Any] = self._push_once

    async def unary(self, request: bytes, context: Any) -> bytes:
        with self._running(context):
            if request == b"wait":
                await asyncio.Event().wait()
            if request == b"fail":
                raise ValueError("a secret")
        return request

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        with self._running(context):
            for _ in range(1_000 if request == LARGE else 3):
                self.yielded += 1
                yield request
            if request == b"wait":
                await asyncio.Event().wait()

    async def pushed(self, request: bytes, context: Any) -> None:
        with self._running(context):
            await self.push(request, context)

    async def chat(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        with self._running(context):
            async for request in requests:
                yield request

    @staticmethod
    async def _push_once(request: bytes, context: Any) -> None:
        context.send(request)

    @contextlib.contextmanager
    def _running(self, context: Any) -> Any:
        self.contexts.append(context)
        self.started += 1
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    @property
    def running(self) -> int:
        return self.started - self.ended

    def add(self, server: Any) -> None:
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "Pushed": grpc.unary_stream_rpc_method_handler(self.pushed),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))


def raw_unary(channel: grpc.aio.Channel, method: str = UNARY) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(method)


def raw_stream(channel: grpc.aio.Channel, method: str) -> grpc.aio.UnaryStreamMultiCallable[bytes, bytes]:
    return channel.unary_stream(method)


def raw_chat(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
    return channel.stream_stream(CHAT)


@asynccontextmanager
async def echoing(**settings: Any) -> AsyncIterator[tuple[Echo, str, Http2RpcServer]]:
    """A server of the h2 kind that carries an Echo."""
    echo = Echo()
    server = Http2RpcServer([("test.Echo", echo.add)], **settings)
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    try:
        yield echo, f"127.0.0.1:{server.port}", server
    finally:
        await server.stop(0)


@asynccontextmanager
async def beside(address: str) -> AsyncIterator[Callable[[], Any]]:
    """A client of gRPC's own on a connection that is there before and after; what is yielded asks once."""
    async with open_channel(address) as channel:

        async def answered() -> None:
            assert await raw_unary(channel)(b"still there?", timeout=WITHIN_S) == b"still there?"

        await answered()
        yield answered
        await answered()


class Answer:
    """What came on one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.data = bytearray()
        self.is_ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        return int({**self.headers, **self.trailers}["grpc-status"])

    @property
    def message(self) -> str:
        return {**self.headers, **self.trailers}.get("grpc-message", "")


class PatientClient(H2Connection):
    """h2's client takes nothing any more after a GOAWAY; calls that run may still be answered."""

    def _receive_goaway_frame(self, frame: Any) -> Any:
        state = self.state_machine.state
        found = super()._receive_goaway_frame(frame)
        self.state_machine.state = state
        return found


class RawPeer:
    """One connection, with the client's half of HTTP/2 under the test's control."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=True,
        )
        self.h2 = PatientClient(config)
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.events: list[Event] = []
        self.goaway: ConnectionTerminated | None = None
        self.is_closed = False
        self.gives_back = True

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def begin(self, stream_id: int, path: str = UNARY, *extra: tuple[str, str], ends: bool = False) -> None:
        """HEADERS of a call; a later field of the same name replaces the usual one."""
        fields = dict([*HEADERS, (":path", path)])
        replaced = dict(extra)
        pseudo = {name: value for name, value in {**fields, **replaced}.items() if name.startswith(":")}
        others = {name: value for name, value in {**fields, **replaced}.items() if not name.startswith(":")}
        kept = [(name, value) for name, value in [*pseudo.items(), *others.items()] if value]
        self.h2.send_headers(stream_id, kept, end_stream=ends)
        self.flush()

    def ask(self, stream_id: int, body: bytes, path: str = UNARY, *extra: tuple[str, str], ends: bool = True) -> None:
        """A whole call, or the beginning of one."""
        self.begin(stream_id, path, *extra)
        self.h2.send_data(stream_id, body, end_stream=ends)
        self.flush()

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    async def read(self) -> None:
        """Take what comes next, and note what it is."""
        data = await self.reader.read(2**16)
        if not data:
            self.is_closed = True
            return
        for event in self.h2.receive_data(data):
            self.events.append(event)
            self._note(event)
        self.flush()

    def _note(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.goaway = event
            return
        answer = self.answers[getattr(event, "stream_id", None) or 0]
        if isinstance(event, ResponseReceived):
            answer.headers = dict(event.headers or [])  # type: ignore[arg-type]
        elif isinstance(event, TrailersReceived):
            answer.trailers = dict(event.headers or [])  # type: ignore[arg-type]
        elif isinstance(event, DataReceived):
            answer.data += event.data or b""
            if self.gives_back:
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
        elif isinstance(event, StreamReset):
            answer.reset = int(event.error_code or 0)
            answer.is_ended = True
        elif isinstance(event, StreamEnded):
            answer.is_ended = True

    async def until(self, condition: Callable[[], object], within_s: float = WITHIN_S) -> None:
        """Read until it is so, or the connection is closed."""
        async with asyncio.timeout(within_s):
            while not condition() and not self.is_closed:
                await self.read()

    async def answer(self, stream_id: int) -> Answer:
        await self.until(lambda: self.answers[stream_id].is_ended)
        assert self.answers[stream_id].is_ended, f"closed: {self.goaway}"
        return self.answers[stream_id]

    async def closed(self, within_s: float = WITHIN_S) -> None:
        """The server closes the connection."""
        with contextlib.suppress(ConnectionError):
            await self.until(lambda: False, within_s)
        self.is_closed = True

    def saw(self, kind: type[Event]) -> int:
        """How many of these have come."""
        return sum(isinstance(event, kind) for event in self.events)


@asynccontextmanager
async def raw_peer(address: str, *, greets: bool = True, **settings: int) -> AsyncIterator[RawPeer]:
    """A connection; with `greets`, preface and settings have been exchanged."""
    host, _, port = address.rpartition(":")
    peer = RawPeer(*await asyncio.open_connection(host, int(port)))
    try:
        if greets:
            if settings:
                peer.h2.local_settings.update({int(key[1:]): value for key, value in settings.items()})
                for _ in settings:
                    peer.h2.local_settings.acknowledge()
            peer.h2.initiate_connection()
            peer.flush()
            await peer.read()
        yield peer
    finally:
        peer.writer.close()
        with contextlib.suppress(ConnectionError):
            await peer.writer.wait_closed()
