"""One call: how its request comes, the task that runs its handler, and how it ends.

Owns the end. A call ends once: by its handler, by its deadline, by the server, or because the client left; what
comes first counts, and nothing is sent after it. Frames and windows are `sender`'s, streams are `connection`'s.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

import grpc

from tandem.errors import InvalidRequest, Overloaded, TandemError
from tandem.rpc.handler_guard import as_error
from tandem.rpc.http2 import limits
from tandem.rpc.http2.call_context import CallContext, Carrier
from tandem.rpc.http2.framing import PREFIX
from tandem.rpc.http2.message_reader import MessageReader, unpacked
from tandem.rpc.http2.metadata import IDENTITY, Fields, Request, sent_fields, status_block
from tandem.rpc.http2.methods import Method
from tandem.rpc.http2.pace import Pace
from tandem.rpc.http2.request_queue import RequestQueue
from tandem.rpc.http2.sender import Outgoing
from tandem.rpc.status import to_grpc_status

log = logging.getLogger(__name__)


class Call(CallContext):
    """A call that is being answered."""

    __slots__ = (
        "_held_bytes",
        "_is_compressed",
        "_message",
        "_pace",
        "_reader",
        "_requests",
        "_task",
        "_timer",
    )

    def __init__(self, carrier: Carrier, stream_id: int, method: Method, request: Request, outgoing: Outgoing) -> None:
        super().__init__(carrier, stream_id, method, request, outgoing)
        self._task: asyncio.Task[None] | None = None
        self._reader: MessageReader | None = None
        self._requests: RequestQueue | None = None
        self._message: bytes | None = None
        self._is_compressed = False
        self._held_bytes = 0
        self._pace: Pace | None = None
        """Of a request that is not whole; None: nothing is missing."""
        self._timer: asyncio.TimerHandle | None = None
        if self._deadline_s is not None:
            self._timer = self._loop.call_at(self._deadline_s, self._expire)
        if not method.is_streamed:
            self._pace = Pace(self._loop.time())
        else:
            give_back = partial(carrier.give_back, stream_id)
            self._requests = RequestQueue(method, self._new_reader(), carrier.request_bytes_max, give_back)
            self._start()

    # What the connection uses.

    @property
    def is_streamed(self) -> bool:
        """Whether the client sends a stream of requests."""
        return self._requests is not None

    def receive(self, data: bytes, size: int, *, ends: bool) -> None:
        """A piece of the request, which took `size` of the client's window; `ends`: it is the last one."""
        if self._is_ended:
            if self._requests is not None:
                self._carrier.give_back(self._stream_id, size)
            return
        try:
            if self._requests is not None:
                whole = self._receive_more(self._requests, data, size, ends)
            else:
                whole = self._receive_one(data, ends)
            if data and not ends and len(data) < limits.PIECE_BYTES_MIN and not self._is_ended:
                self._carrier.count_piece(whole)
        except TandemError as problem:
            self._reject(problem)

    def look(self, now_s: float) -> None:
        """End it if its request does not go on, or its response is not read. Called every few seconds."""
        if self._requests is not None:
            if not self._requests.lacks_bytes:
                self._pace = None
            elif self._pace is None:
                self._pace = Pace(now_s)
        if self._pace is not None and self._pace.is_slow(now_s):
            self._reject(
                InvalidRequest(
                    "request",
                    f"did not go on: {limits.PROGRESS_BYTES} bytes must come in {limits.PROGRESS_TIMEOUT_S:g} s, "
                    f"and a message in {limits.MESSAGE_TIMEOUT_S:g} s",
                )
            )
        elif self._outgoing.is_slow(now_s):
            self.cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "the response is not read")

    def evict(self) -> None:
        """Its unfinished request is given up for those of others."""
        self._reject(Overloaded("too many requests are arriving at the same time, and others go on faster"))

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
        """The client is gone: its handler is cancelled, and nothing is sent."""
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

    def _fail(self, problem: Exception) -> None:
        self.refuse(as_error(problem, self._method.path))
        self._cancel()

    def _reject(self, problem: TandemError) -> None:
        """The request cannot be read any further."""
        self._carrier.count_failure(problem)
        self.refuse(problem)
        self._cancel()

    def _receive_more(self, requests: RequestQueue, data: bytes, size: int, ends: bool) -> int:
        """Of a stream of requests. Returns how many messages this completes."""
        whole = requests.feed(data, size, ends=ends)
        if whole or self._pace is None:
            self._pace = Pace(self._loop.time()) if requests.lacks_bytes else None
        self._hold(requests.held_bytes, size)
        return whole

    def _receive_one(self, data: bytes, ends: bool) -> int:
        """Of the one request. Returns how many messages this completes."""
        if ends and self._reader is None and len(data) >= PREFIX.size:
            flag, length = PREFIX.unpack_from(data)
            if flag == 0 and length == len(data) - PREFIX.size <= self._carrier.request_bytes_max:
                self._message = data[PREFIX.size :]
                self._start()
                return 1
        return self._receive_piece(data, ends)

    def _receive_piece(self, data: bytes, ends: bool) -> int:
        """Of a request that does not come as one frame."""
        reader = self._reader
        if reader is None:
            reader = self._reader = self._new_reader()
        messages = reader.feed(data)
        for is_compressed, message in messages:
            if self._message is not None:
                raise InvalidRequest("request", "is more than one message")
            self._is_compressed, self._message = is_compressed, message
        if self._message is not None and reader.held_bytes:
            raise InvalidRequest("request", "is more than one message")
        if not ends:
            self._hold(reader.held_bytes + len(self._message or b""), len(data))
            return len(messages)
        reader.finish()
        if self._message is None:
            raise InvalidRequest("request", "holds no message")
        self._start()
        return len(messages)

    def _new_reader(self) -> MessageReader:
        may_be_compressed = self._request.encoding != IDENTITY
        return MessageReader(self._carrier.request_bytes_max, may_be_compressed=may_be_compressed)

    def _hold(self, size: int, more: int = 0) -> None:
        """So many bytes of the request are kept; `more` have just come."""
        advances = self._pace is not None and self._pace.count(more, self._loop.time())
        if size != self._held_bytes:
            self._held_bytes = size
            self._carrier.hold(self, size, advances=advances)

    def _finish_request(self) -> None:
        """Nothing more of it is waited for."""
        self._pace = self._reader = None
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
        except Exception as problem:  # here every error of a handler becomes a status
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

    def _end(self, code: grpc.StatusCode, details: str, fields: Fields) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        self._finish_request()
        try:
            if not self._is_opened:
                fields = [*fields, *self._head_fields()]
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
