"""The requests of one stream, between the peer that sends them and the handler that reads them.

Owns the order and the bound: what the handler has not read is not given back to the peer's window, so that the peer
stops. Knows no frames.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tandem.errors import Overloaded
from tandem.rpc.http2 import limits
from tandem.rpc.http2.message_reader import MessageReader, unpacked
from tandem.rpc.http2.methods import Method


class RequestQueue:
    """An async iterator over requests, as handlers of request streams are given."""

    def __init__(self, method: Method, reader: MessageReader, bytes_max: int, give_back: Callable[[int], None]) -> None:
        """`give_back` lets the peer send so many bytes more."""
        self._method = method
        self._bytes_max = bytes_max
        self._give_back = give_back
        self._reader = reader
        self._messages: deque[tuple[bool, bytes]] = deque()
        self._kept_bytes = 0
        """Received and not given back."""
        self._is_ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def held_bytes(self) -> int:
        """Of a message that is not whole."""
        return self._reader.held_bytes

    @property
    def lacks_bytes(self) -> bool:
        """Whether it is the peer's turn: a message is not whole, and those before it have been read."""
        return self._reader.held_bytes > 0 and not self._messages

    def feed(self, data: bytes, size: int, *, ends: bool) -> int:
        """A piece of the stream, which took `size` of the peer's window. Returns how many messages it has completed.

        Raises:
            TandemError: it is not what gRPC sends, or too much of it.
        """
        self._kept_bytes += size
        messages = self._reader.feed(data)
        self._messages.extend(messages)
        if len(self._messages) > limits.QUEUED_REQUESTS_MAX:
            raise Overloaded("the client sends messages faster than they are read: send the next ones more slowly")
        if not self._messages:
            # The handler waits for the rest of a message: it must be able to come.
            self._give_back_kept()
        if ends:
            self._reader.finish()
            self._is_ended = True
        self._wake()
        return len(messages)

    def close(self) -> None:
        """Nothing of it will be read any more."""
        self._messages.clear()
        self._is_ended = True
        self._give_back_kept()

    def __aiter__(self) -> RequestQueue:
        return self

    async def __anext__(self) -> Any:
        while not self._messages:
            if self._is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        is_compressed, message = self._messages.popleft()
        if not self._messages:
            self._give_back_kept()
        if is_compressed:
            message = await unpacked(message, self._bytes_max)
        return self._method.request(message)

    def _give_back_kept(self) -> None:
        size, self._kept_bytes = self._kept_bytes, 0
        if size:
            self._give_back(size)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
