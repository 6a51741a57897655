"""gRPC over `http2.py`, both sides, as lean as Python gets: whole messages in, whole messages out.

Owns the framing of messages, statuses and the dispatch by method. Knows no protobuf: a message is bytes here.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from typing import Protocol
from urllib.parse import quote, unquote

from benchmarks.peers.http2 import Http2Protocol, header_block

PREFIX = struct.Struct(">BI")
RESPONSE_HEADERS = header_block([(":status", "200"), ("content-type", "application/grpc")])
OK_TRAILERS = header_block([("grpc-status", "0")])
OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, FAILED_PRECONDITION, UNIMPLEMENTED, UNAVAILABLE = 0, 1, 2, 3, 9, 12, 14


def framed(message: bytes) -> bytes:
    """A message behind its length."""
    return PREFIX.pack(0, len(message)) + message


class Messages:
    """The messages of one direction of one stream, from pieces of data."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Those that are whole now."""
        if self._buffer:
            data = self._buffer + data
        size, at, found = len(data), 0, []
        while size - at >= PREFIX.size:
            end = at + PREFIX.size + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > size:
                break
            found.append(data[at + PREFIX.size : end])
            at = end
        self._buffer = data[at:]
        return found


class ServerCall:
    """One call that a server answers; the request has been read whole."""

    __slots__ = ("_has_headers", "connection", "is_open", "method", "on_cancel", "request", "stream_id")

    def __init__(self, connection: GrpcServer, stream_id: int, method: str) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.method = method
        self.request = Messages()
        self.on_cancel: Callable[[], None] | None = None
        """Called once when the caller leaves before the end."""
        self.is_open = True
        self._has_headers = False

    def send(self, message: bytes) -> None:
        """Send a message; `flush` of the connection lets it go."""
        self.send_framed(framed(message))

    def send_framed(self, data: bytes) -> None:
        """Send what has its length before it already."""
        if not self._has_headers:
            self._has_headers = True
            self.connection.send_headers(self.stream_id, RESPONSE_HEADERS)
        self.connection.send_data(self.stream_id, data)

    def finish(self, status: int = OK, message: str = "", details: bytes = b"") -> None:
        """End the call. `details` are a google.rpc.Status."""
        if not self.is_open:
            return
        self.is_open = False
        trailers = OK_TRAILERS
        if status != OK:
            facts = [("grpc-status", str(status)), ("grpc-message", quote(message, safe=" "))]
            if details:
                facts.append(("grpc-status-details-bin", base64.b64encode(details).decode().rstrip("=")))
            trailers = header_block(facts)
        if not self._has_headers:
            self.connection.send_headers(self.stream_id, RESPONSE_HEADERS)
        self.connection.send_headers(self.stream_id, trailers, end=True)
        self.connection.end(self)

    def cancelled(self) -> None:
        """The caller has left."""
        if self.is_open:
            self.is_open = False
            if self.on_cancel is not None:
                self.on_cancel()


Method = Callable[[ServerCall, bytes], None]
"""Given a call and its one request message."""


class GrpcServer(Http2Protocol):
    """A server's side of one connection; every method takes one request message."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        """`methods` by path, "/package.Service/Method"."""
        super().__init__()
        self._methods = methods
        self._calls: dict[int, ServerCall] = {}

    def on_headers(self, stream_id: int, headers: list[tuple[str, str]], ended: bool) -> None:
        """A call begins."""
        if stream_id in self._calls:
            return
        method = next((value for name, value in headers if name == ":path"), "")
        self._calls[stream_id] = ServerCall(self, stream_id, method)
        self.open_stream(stream_id)

    def on_data(self, stream_id: int, payload: bytes, ended: bool) -> None:
        """The request, or a part of it."""
        call = self._calls.get(stream_id)
        if call is None:
            return
        for message in call.request.feed(payload):
            method = self._methods.get(call.method)
            if method is None:
                call.finish(UNIMPLEMENTED, f"no method {call.method}")
            else:
                method(call, message)

    def on_reset(self, stream_id: int) -> None:
        """The caller has left one call."""
        call = self._calls.pop(stream_id, None)
        if call is not None:
            call.cancelled()

    def on_lost(self) -> None:
        """The caller has left all of them."""
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.cancelled()

    def end(self, call: ServerCall) -> None:
        """Forget a call that has been answered. Data that is still held back goes out before its trailers."""
        self._calls.pop(call.stream_id, None)
        if call.stream_id not in self._held:
            self.close_stream(call.stream_id)


class Sink(Protocol):
    """What a client's call is read by."""

    def on_message(self, message: bytes, at_s: float) -> None:
        """A message has come."""

    def on_end(self, status: int, text: str) -> None:
        """The call has ended; nothing follows."""


class GrpcClient(Http2Protocol):
    """A client's side of one connection."""

    is_client = True

    def __init__(self, authority: str) -> None:
        super().__init__()
        self._authority = authority
        self._next_id = 1
        self._sinks: dict[int, tuple[Sink, Messages]] = {}
        self._blocks: dict[str, bytes] = {}

    def call(self, method: str, request: bytes, sink: Sink) -> int:
        """Begin a call with one request message. Returns its stream."""
        block = self._blocks.get(method)
        if block is None:
            block = self._blocks[method] = header_block(
                [
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":path", method),
                    (":authority", self._authority),
                    ("te", "trailers"),
                    ("content-type", "application/grpc"),
                ]
            )
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._sinks[stream_id] = (sink, Messages())
        self.open_stream(stream_id)
        self.send_headers(stream_id, block)
        self.send_data(stream_id, framed(request), end=True)
        self.flush()
        return stream_id

    def on_data(self, stream_id: int, payload: bytes, ended: bool) -> None:
        """Messages of one call."""
        entry = self._sinks.get(stream_id)
        if entry is not None:
            for message in entry[1].feed(payload):
                entry[0].on_message(message, self.received_s)

    def on_headers(self, stream_id: int, headers: list[tuple[str, str]], ended: bool) -> None:
        """The first headers say nothing; the last ones end the call."""
        if not ended:
            return
        facts = dict(headers)
        status = int(facts.get("grpc-status", UNKNOWN))
        self._end(stream_id, status, unquote(facts.get("grpc-message", "")))

    def on_reset(self, stream_id: int) -> None:
        """The server has dropped one call."""
        self._end(stream_id, UNAVAILABLE, "the stream was reset")

    def on_lost(self) -> None:
        """The server has dropped all of them."""
        for stream_id in list(self._sinks):
            self._end(stream_id, UNAVAILABLE, "the connection was lost")

    def _end(self, stream_id: int, status: int, text: str) -> None:
        entry = self._sinks.pop(stream_id, None)
        self.close_stream(stream_id)
        if entry is not None:
            entry[0].on_end(status, text)
