"""What a handler is given as the context of its call: what handlers use of a grpc.aio.ServicerContext, and `send`.

Owns what the handler has said of the status, and its wish to be called when it may send again. How a call begins, runs
and ends is `call`'s.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from tandem.errors import TandemError
from tandem.rpc.http2.metadata import Fields, Metadata, Request, sent_fields
from tandem.rpc.http2.methods import Method
from tandem.rpc.http2.pace import HeldMessage
from tandem.rpc.http2.peer import Peer
from tandem.rpc.http2.sender import Outgoing

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

    def hold(self, message: HeldMessage, size: int, *, advances: bool) -> None:
        """So many bytes of an unfinished request are in memory; with `advances` it has made progress.

        Where they do not fit, the slowest request is ended.
        """

    def count_piece(self, messages: int) -> None:
        """A short piece of a request has come, which completes so many messages.

        Raises:
            Overloaded: too many complete none.
        """

    def give_back(self, stream_id: int, size: int) -> None:
        """So many bytes of a stream have been read."""

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a call's task until it has ended."""

    def count_failure(self, error: TandemError) -> None:
        """A call was refused before its handler saw it."""


class CallContext(abc.ABC):
    """Of one call, as its handler sees it."""

    __slots__ = (
        "_callback",
        "_carrier",
        "_code",
        "_deadline_s",
        "_details",
        "_head",
        "_is_ended",
        "_is_opened",
        "_loop",
        "_method",
        "_outgoing",
        "_request",
        "_stream_id",
        "_trailing",
        "_waiter",
    )

    def __init__(self, carrier: Carrier, stream_id: int, method: Method, request: Request, outgoing: Outgoing) -> None:
        self._carrier = carrier
        self._stream_id = stream_id
        self._method = method
        self._request = request
        self._outgoing = outgoing
        self._loop = asyncio.get_running_loop()
        self._is_opened = self._is_ended = False
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: Fields = ()
        self._head: Callable[[], Metadata] | None = None
        self._callback: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline_s: float | None = None
        if request.timeout_s is not None and request.timeout_s < TIMEOUT_S_MAX:
            self._deadline_s = self._loop.time() + request.timeout_s

    def send(self, message: Any) -> None:
        """Send a message of the response, or its bytes. Never waits; nothing is sent once the call has ended."""
        if self._is_ended:
            return
        data = message if type(message) is bytes else self._method.serialize(message)
        if not self._is_opened:
            self._open(self._head_fields())
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
        self._outgoing.on_writable = self._notify_writable

    async def write(self, message: Any) -> None:
        """`send`, and wait until the call is writable."""
        self.send(message)
        if not self._outgoing.writable:
            await self._wait_writable()

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send the headers of the response now, with these among them."""
        if not self._is_opened and not self._is_ended:
            self._open([*self._head_fields(), *sent_fields(metadata)])

    def set_initial_metadata(self, head: Callable[[], Metadata]) -> None:
        """What the headers of the response hold, asked for when they are sent: also those of a call that only fails."""
        self._head = head

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

    def count_unread_for(self, account: str) -> None:
        """Count the response for an account while it is complete and much of it unread, see `Http2RpcServer`."""
        self._outgoing.account = account

    def auth_context(self) -> dict[str, list[bytes]]:
        """The client's certificate; nothing without TLS."""
        return self._carrier.peer.auth_context()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._is_ended

    async def _wait_writable(self) -> None:
        self._waiter = self._loop.create_future()
        self._outgoing.on_writable = self._notify_writable
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _notify_writable(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._callback is not None:
            try:
                self._callback()
            except Exception as problem:  # a defect of a handler must not end its connection
                self._fail(problem)

    def _head_fields(self) -> Fields:
        return () if self._head is None else sent_fields(self._head())

    def _open(self, fields: Fields) -> None:
        self._is_opened = True
        self._carrier.open_response(self._stream_id, fields)

    @abc.abstractmethod
    def _fail(self, problem: Exception) -> None:
        """End the call because something that the handler left here has failed."""
