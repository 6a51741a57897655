"""The streams of one connection: which call each carries, how it begins, and how it is closed towards h2.

Owns the table of calls and the bytes of requests that are not whole. What ends all of them at once is `connection`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc
from h2.errors import ErrorCodes

from tandem.errors import NotSupported, RequestTooLarge, TandemError
from tandem.rpc.http2 import limits
from tandem.rpc.http2.call import Call
from tandem.rpc.http2.conduct import Conduct
from tandem.rpc.http2.framing import Http2State, header_block
from tandem.rpc.http2.metadata import (
    CONTENT_TYPE,
    ENCODINGS,
    RESPONSE_BLOCK,
    Fields,
    HttpRefusal,
    Request,
    read_request,
    sent_fields,
    status_block,
)
from tandem.rpc.http2.methods import Methods
from tandem.rpc.http2.pace import HeldMessage, MessageMemory
from tandem.rpc.http2.peer import Peer
from tandem.rpc.http2.sender import Outgoing, Sender
from tandem.rpc.status import to_grpc_status

ACCEPTED_ENCODINGS = (b"grpc-accept-encoding", b",".join(ENCODINGS))
UNIMPLEMENTED_BLOCK = status_block(grpc.StatusCode.UNIMPLEMENTED.value[0], "Method not found!", (), opens=True)


class Shared(Protocol):
    """What the connections of one server share."""

    methods: Methods
    held: MessageMemory
    unsent: MessageMemory
    request_bytes_max: int
    streams_max: int

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a call's task until it has ended."""

    def count_failure(self, error: TandemError) -> None:
        """A call was refused before its handler saw it."""


class Streams:
    """Of one connection; what its calls see of it (`tandem.rpc.http2.call_context.Carrier`)."""

    def __init__(
        self,
        shared: Shared,
        state: Http2State,
        sender: Sender,
        peer: Peer,
        conduct: Conduct,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` is called after each call that has ended."""
        self.peer = peer
        self.request_bytes_max = shared.request_bytes_max
        self._shared = shared
        self._state = state
        self._sender = sender
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, Call] = {}
        self._held = MessageMemory(shared.held.bytes_max // limits.HELD_SHARE)
        self._conduct = conduct
        sender.on_evicted = self._evict
        self._unacknowledged_bytes = 0

    @property
    def count(self) -> int:
        """Calls that are open."""
        return len(self._calls)

    # What the peer does.

    def begin(self, stream_id: int, fields: Fields, *, ends: bool) -> int:
        """A call, or what is refused at once. `ends`: there is no more of it.

        Returns what its headers have cost for nothing, in streams that were opened for nothing.

        Raises:
            Malformed: this is no HTTP/2.
        """
        try:
            self._begin(stream_id, fields, ends)
        except HttpRefusal as refusal:
            self.close_response(stream_id, refusal.block)
        except TandemError as problem:
            self._refuse(stream_id, problem)
            return limits.LARGE_HEADERS_COST if isinstance(problem, RequestTooLarge) else 1
        else:
            return 0
        return 1

    def _begin(self, stream_id: int, fields: Fields, ends: bool) -> None:
        request = read_request(fields)
        method = self._shared.methods.find(request.path)
        if method is None:
            self.close_response(stream_id, UNIMPLEMENTED_BLOCK)
            return
        _check_encoding(request)
        stream = self._state.streams[stream_id]
        call = self._calls[stream_id] = Call(self, stream_id, method, request, Outgoing(self._sender, stream))
        if ends:
            call.receive(b"", 0, ends=True)

    def _refuse(self, stream_id: int, problem: TandemError) -> None:
        self.count_failure(problem)
        status = to_grpc_status(problem)
        fields = sent_fields(status.trailing_metadata or ())
        if isinstance(problem, NotSupported):
            fields.append(ACCEPTED_ENCODINGS)
        self.close_response(stream_id, status_block(status.code.value[0], status.details, fields, opens=True))

    def receive(self, stream_id: int, data: bytes, size: int, *, ends: bool) -> bool:
        """Bytes of a request, which took `size` of the peer's window. Returns whether there is such a call."""
        call = self._calls.get(stream_id)
        if call is None or not call.is_streamed:
            self._acknowledge(stream_id, size, ends)
        if call is not None:
            call.receive(data, size, ends=ends)
        return call is not None

    def _acknowledge(self, stream_id: int, size: int, ends: bool) -> None:
        """Let the peer send more. Of a stream that has ended, only the connection's window matters."""
        if not ends:
            self.give_back(stream_id, size)
            return
        self._unacknowledged_bytes += size
        if self._unacknowledged_bytes >= limits.ACK_BYTES:
            size, self._unacknowledged_bytes = self._unacknowledged_bytes, 0
            self.give_back(stream_id, size)

    def leave(self, stream_id: int) -> None:
        """The peer has given up a call."""
        self._state.forget(stream_id)
        call = self._calls.pop(stream_id, None)
        if call is not None:
            call.leave()
            self._on_end()

    def wake(self, stream_id: int | None) -> None:
        """The peer lets more through on a stream; without one, on the connection or on all of them."""
        if stream_id is None:
            for call in self._calls.values():
                call.wake()
        elif stream_id in self._calls:
            self._calls[stream_id].wake()
        self._sender.pump()

    # What ends them.

    def leave_all(self) -> None:
        """The peer is gone."""
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.leave()

    def cut_all(self, code: grpc.StatusCode, details: str) -> None:
        """End all calls with this status."""
        for call in list(self._calls.values()):
            call.cut(code, details)

    def look(self) -> None:
        """End calls whose request does not go on, or whose response is not read."""
        now_s = self._loop.time()
        for call in list(self._calls.values()):
            call.look(now_s)

    def _evict(self, stream_id: int) -> None:
        """What is unsent of a call is given up for that of others."""
        call = self._calls.get(stream_id)
        if call is not None:
            call.cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many responses are not read, and others go on faster")

    # What calls do.

    def open_response(self, stream_id: int, fields: Fields) -> None:
        """Send the headers of a response."""
        if self._state.open_stream(stream_id) is None:
            return
        block = RESPONSE_BLOCK
        if fields:
            block = header_block(200, [(b"content-type", CONTENT_TYPE), *fields])
        self._sender.control(self._state.headers_frame(stream_id, block, ends=False))

    def close_response(self, stream_id: int, block: bytes) -> None:
        """Send the block that ends a stream; what the client still sends of its request is not read."""
        if self._state.open_stream(stream_id) is not None:
            self._sender.control(self._state.headers_frame(stream_id, block, ends=True))
            if self._state.open_stream(stream_id) is not None:
                self._state.reset_stream(stream_id, ErrorCodes.NO_ERROR)
                self._sender.take_from_state()
        self._close(stream_id)

    def reset(self, stream_id: int, error_code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """End a stream in the middle."""
        if self._state.open_stream(stream_id) is not None:
            self._state.reset_stream(stream_id, error_code)
            self._sender.take_from_state()
        self._close(stream_id)

    def hold(self, message: HeldMessage, size: int, *, advances: bool) -> None:
        """Count bytes of an unfinished request, of this connection and of all; the slowest is given up for others."""
        for memory in (self._held, self._shared.held):
            memory.keep(message, size)
            if advances:
                memory.advance(message)
        for memory in (self._held, self._shared.held):
            if memory.bytes > memory.bytes_max:
                memory.evict()

    def count_piece(self, messages: int) -> None:
        """A short piece of a request has come, which completes so many messages.

        Raises:
            Overloaded: too many complete none.
        """
        self._conduct.piece(self._loop.time(), messages)

    def give_back(self, stream_id: int, size: int) -> None:
        """Let the peer send so many bytes more."""
        if not self._sender.is_closed:
            self._state.acknowledge_received_data(size, stream_id)
            self._sender.take_from_state()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a call's task until it has ended."""
        self._shared.keep(task)

    def count_failure(self, error: TandemError) -> None:
        """A call was refused before its handler saw it."""
        self._shared.count_failure(error)

    def _close(self, stream_id: int) -> None:
        self._state.forget(stream_id)
        call = self._calls.pop(stream_id, None)
        if call is not None:
            call.close()
            self._on_end()


def _check_encoding(request: Request) -> None:
    if request.encoding not in ENCODINGS:
        name = request.encoding[:64].decode("ascii", "replace")
        raise NotSupported(f"grpc-encoding {name!r} is not supported", field="grpc-encoding")
