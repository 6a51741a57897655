"""One call: what its handler is given as context, the task that runs it, and how it ends.

Owns the status. A call ends once: by its handler, by its deadline, by the server, or because the client left; what
comes first counts, and nothing is sent after it. Frames and windows are `sender`'s, streams are `connection`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import grpc

from tandem.errors import InvalidRequest, TandemError
from tandem.rpc.handler_guard import as_error
from tandem.rpc.http2.framing import PREFIX
from tandem.rpc.http2.message_reader import MessageReader, unpacked
from tandem.rpc.http2.metadata import IDENTITY, Fields, Metadata, Request, sent_fields, status_block
from tandem.rpc.http2.methods import Method
from tandem.rpc.http2.peer import Peer
from tandem.rpc.http2.request_queue import RequestQueue
from tandem.rpc.http2.sender import Outgoing
from tandem.rpc.status import to_grpc_status

log = logging.getLogger(__name__)

TIMEOUT_S_MAX = 30 * 24 * 3_600.0
"""A later deadline is none: timers of a loop cannot wait longer."""


class Carrier(Protocol):
    """What a call needs of the connection that carries it."""

    peer: Peer
    request_bytes_max: int

    def open_response(self, stream_id: int, fields: Fields) -> None:
        """Send the headers of a response."""

    def close_response(self, stream_id: int, block: bytes) -> None:
        """Send the block that ends a stream; all messages have left."""

    def reset(self, stream_id: int) -> None:
        """Give up what has not been sent on a stream."""

    def hold(self, size: int) -> None:
        """So many bytes more (or fewer) of unfinished requests are in memory.

        Raises:
            Overloaded: there is no room for them.
        """

    def give_back(self, stream_id: int, size: int) -> None:
        """So many bytes of a stream have been read."""

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a call's task until it has ended."""

    def count_failure(self, error: TandemError) -> None:
        """A call was refused before its handler saw it."""


class Call:
    """A call that is being answered. Handlers find here what they use of a grpc.aio.ServicerContext, and `send`."""

    __slots__ = (
        "_callback", "_carrier", "_code", "_deadline_s", "_details", "_held_bytes", "_is_compressed", "_is_ended",
        "_is_opened", "_loop", "_message", "_method", "_outgoing", "_reader", "_request", "_requests", "_stream_id",
        "_task", "_timer", "_trailing", "_waiter", "heard_s",
    )  # fmt: skip

    def __init__(self, carrier: Carrier, stream_id: int, method: Method, request: Request, outgoing: Outgoing) -> None:
        self._carrier = carrier
        self._stream_id = stream_id
        self._method = method
        self._request = request
        self._outgoing = outgoing
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._reader: MessageReader | None = None
        self._requests: RequestQueue | None = None
        self._message: bytes | None = None
        self._is_compressed = self._is_opened = self._is_ended = False
        self._held_bytes = 0
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: Fields = ()
        self._callback: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.heard_s: float | None = self._loop.time()
        """When the last piece of a request came that is not whole; None: nothing is missing."""
        if request.timeout_s is not None and request.timeout_s < TIMEOUT_S_MAX:
            self._deadline_s = self.heard_s + request.timeout_s
            self._timer = self._loop.call_at(self._deadline_s, self._expire)
        if method.is_streamed:
            give_back = partial(carrier.give_back, stream_id)
            self._requests = RequestQueue(method, self._new_reader(), carrier.request_bytes_max, give_back)
            self._start()

    # What handlers use.

    def send(self, message: Any) -> None:
        """Send a message of the response, or its bytes. Never waits; nothing is sent once the call has ended."""
        if self._is_ended:
            return
        data = message if type(message) is bytes else self._method.serialize(message)
        if not self._is_opened:
            self._open(())
        self._outgoing.send(data)

    @property
    def writable(self) -> bool:
        """False while more than a small part of what was sent waits for the client or for the socket."""
        return self._outgoing.writable

    @property
    def unsent_bytes(self) -> int:
        """So many wait."""
        return self._outgoing.unsent_bytes

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Be called each time this becomes writable again; None ends it. There is one callback for each call."""
        self._callback = callback
        self._outgoing.on_writable = self._tell_writable

    async def write(self, message: Any) -> None:
        """`send`, and wait until the call is writable."""
        self.send(message)
        if not self._outgoing.writable:
            await self._wait_writable()

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send the headers of the response now, with these among them."""
        if not self._is_opened and not self._is_ended:
            self._open(sent_fields(metadata))

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """What is to be sent with the status."""
        self._trailing = sent_fields(metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status of a handler that returns."""
        self._code = code

    def set_details(self, details: str) -> None:
        """The message of that status."""
        self._details = details

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with a status.

        Raises:
            grpc.aio.AbortError: always.
        """
        self._code, self._details = code, details
        if trailing_metadata:
            self._trailing = sent_fields(trailing_metadata)
        raise grpc.aio.AbortError

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What the client sent with the call."""
        return self._request.metadata()

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._loop.time())

    def peer(self) -> str:
        """The client's address."""
        return self._carrier.peer.address

    def auth_context(self) -> dict[str, list[bytes]]:
        """The client's certificate; nothing without TLS."""
        return self._carrier.peer.auth_context()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._is_ended

    # What the connection uses.

    @property
    def is_streamed(self) -> bool:
        """Whether the client sends a stream of requests."""
        return self._requests is not None

    def receive(self, data: bytes, size: int, *, ends: bool) -> None:
        """A piece of the request, which took `size` of the client's window; `ends`: it is the last one."""
        if self._is_ended:
            return
        try:
            if self._requests is not None:
                self._requests.feed(data, size, ends=ends)
                self._hold(self._requests.held_bytes)
            else:
                self._receive_one(data, ends)
        except TandemError as problem:
            self._carrier.count_failure(problem)
            self.refuse(problem)
            self._cancel()

    def wake(self) -> None:
        """The client lets more of it through."""
        self._outgoing.wake()

    def refuse(self, error: TandemError) -> None:
        """End the call with an error."""
        status = to_grpc_status(error)
        self._end(status.code, status.details, sent_fields(status.trailing_metadata or ()))

    def cut(self, code: grpc.StatusCode, details: str) -> None:
        """The server ends the call; its handler is cancelled. What waits for the client is not sent any more."""
        if self._is_ended or not self._outgoing.cut():
            # A status in the middle of a message would be nothing that a client understands.
            self._carrier.reset(self._stream_id)
        else:
            self._end(code, details, ())
        self._cancel()

    def leave(self) -> None:
        """The client is gone: its handler is cancelled, and nobody is told."""
        self.close()
        self._cancel()

    def close(self) -> None:
        """Its stream is gone, all has been sent or nothing will be."""
        self._is_ended = True
        self._finish_request()
        self._outgoing.discard()
        self._callback = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # How it runs.

    def _receive_one(self, data: bytes, ends: bool) -> None:
        if ends and self._reader is None and len(data) >= PREFIX.size:
            flag, length = PREFIX.unpack_from(data)
            if flag == 0 and length == len(data) - PREFIX.size <= self._carrier.request_bytes_max:
                self._message = data[PREFIX.size :]
                self._start()
                return
        self._receive_piece(data, ends)

    def _receive_piece(self, data: bytes, ends: bool) -> None:
        """Of a request that does not come as one frame."""
        reader = self._reader
        if reader is None:
            reader = self._reader = self._new_reader()
        for is_compressed, message in reader.feed(data):
            if self._message is not None:
                raise InvalidRequest("request", "is more than one message")
            self._is_compressed, self._message = is_compressed, message
        if self._message is not None and reader.held_bytes:
            raise InvalidRequest("request", "is more than one message")
        if not ends:
            self.heard_s = self._loop.time()
            self._hold(reader.held_bytes + len(self._message or b""))
            return
        reader.finish()
        if self._message is None:
            raise InvalidRequest("request", "holds no message")
        self._start()

    def _new_reader(self) -> MessageReader:
        may_be_compressed = self._request.encoding != IDENTITY
        return MessageReader(self._carrier.request_bytes_max, may_be_compressed=may_be_compressed)

    def _hold(self, size: int) -> None:
        if size != self._held_bytes:
            more, self._held_bytes = size - self._held_bytes, size
            self._carrier.hold(more)

    def _finish_request(self) -> None:
        """Nothing more of it is waited for."""
        self.heard_s = self._reader = None
        self._hold(0)
        if self._requests is not None and self._is_ended:
            self._requests.close()

    def _start(self) -> None:
        self._finish_request()
        self._task = self._loop.create_task(self._run())
        self._carrier.keep(self._task)

    async def _run(self) -> None:
        try:
            await self._answer()
        except asyncio.CancelledError:
            self._end(grpc.StatusCode.CANCELLED, "the handler was cancelled", ())
            raise
        except grpc.aio.AbortError:
            pass
        except Exception as problem:
            self.refuse(as_error(problem, self._method.path))
        self._end(self._code, self._details, self._trailing)

    async def _answer(self) -> None:
        """Call the handler. Its request is not kept here: a stream may take long."""
        method = self._method
        if self._is_compressed:
            assert self._message is not None
            self._message = await unpacked(self._message, self._carrier.request_bytes_max)
        result = method.behavior(self._take_request(), self)
        if not method.is_streaming:
            self.send(await result)
        elif hasattr(result, "__aiter__"):
            await self._send_all(result)
        else:
            await result

    def _take_request(self) -> Any:
        if self._requests is not None:
            return self._requests
        assert self._message is not None
        message, self._message = self._message, None
        return self._method.request(message)

    async def _send_all(self, responses: Any) -> None:
        try:
            async for response in responses:
                self.send(response)
                if not self._outgoing.writable:
                    await self._wait_writable()
        finally:
            await responses.aclose()

    async def _wait_writable(self) -> None:
        self._waiter = self._loop.create_future()
        self._outgoing.on_writable = self._tell_writable
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _tell_writable(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._callback is not None:
            try:
                self._callback()
            except Exception as problem:
                self.refuse(as_error(problem, self._method.path))
                self._cancel()

    def _open(self, fields: Fields) -> None:
        self._is_opened = True
        self._carrier.open_response(self._stream_id, fields)

    def _end(self, code: grpc.StatusCode, details: str, fields: Fields) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        self._finish_request()
        try:
            block = status_block(code.value[0], details, fields, opens=not self._is_opened)
        except ValueError as problem:
            log.error("the status of %s: %s", self._method.path, problem)
            block = status_block(grpc.StatusCode.INTERNAL.value[0], "", (), opens=not self._is_opened)
        self._outgoing.finish(partial(self._carrier.close_response, self._stream_id, block))

    def _expire(self) -> None:
        self._timer = None
        self.cut(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _cancel(self) -> None:
        # A task that was cancelled keeps its exception, and that the frames which know this call.
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
