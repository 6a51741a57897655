"""Connections between two simulated engines: over TCP or, in a simulation on virtual time, in memory.

Owns connections only; `wire` defines the messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

LINE_BYTES_MAX = 4096


class Writer(Protocol):
    """The sending end of a connection: the part of asyncio.StreamWriter that is used here."""

    def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def drain(self) -> None:
        """Wait until more can be sent.

        Raises:
            OSError: the connection is gone.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


Handler = Callable[[asyncio.StreamReader, Writer], Awaitable[None]]


class Listener(Protocol):
    """A listening socket."""

    port: int

    async def close(self) -> None:
        """Stop accepting connections."""
        ...


class Network(Protocol):
    """Makes listeners and connections."""

    async def listen(self, handler: Handler, host: str, port: int) -> Listener:
        """Serve connections at an address; port 0: any free port.

        Raises:
            OSError: the address cannot be bound.
        """
        ...

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, Writer]:
        """Connect to an address.

        Raises:
            OSError: the connection failed.
            ValueError, OverflowError: the host or port is invalid.
        """
        ...


class TcpListener:
    """A TCP server."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self.port: int = server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop accepting connections."""
        self._server.close()
        await self._server.wait_closed()


class TcpNetwork:
    """Real TCP sockets."""

    async def listen(self, handler: Handler, host: str, port: int) -> TcpListener:
        """See the protocol."""
        return TcpListener(await asyncio.start_server(handler, host, port, limit=LINE_BYTES_MAX))

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, Writer]:
        """See the protocol."""
        return await asyncio.open_connection(host, port, limit=LINE_BYTES_MAX)


class MemoryWriter:
    """The sending end of an in-memory connection; data arrives in the next iteration of the event loop."""

    def __init__(self, there: asyncio.StreamReader) -> None:
        self._there = there
        self.other: MemoryWriter | None = None
        self._closed = False

    def write(self, data: bytes) -> None:
        """See the protocol."""
        if not self._closed:
            asyncio.get_running_loop().call_soon(self._there.feed_data, data)

    async def drain(self) -> None:
        """See the protocol."""
        await asyncio.sleep(0)
        if self._closed or (self.other is not None and self.other._closed):
            raise ConnectionResetError("the connection is closed")

    def close(self) -> None:
        """See the protocol."""
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().call_soon(self._there.feed_eof)


class MemoryListener:
    """A listening port of an in-memory network."""

    def __init__(self, network: MemoryNetwork, port: int) -> None:
        self._network = network
        self.port = port

    async def close(self) -> None:
        """See the protocol."""
        self._network.forget(self.port)


class MemoryNetwork:
    """An in-memory network shared by all engines of a simulation; host names are ignored."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._next_port = 1
        self._served: set[asyncio.Future[None]] = set()

    async def listen(self, handler: Handler, host: str, port: int) -> MemoryListener:
        """See the protocol."""
        if port == 0:
            port, self._next_port = self._next_port, self._next_port + 1
        if port in self._handlers:
            raise OSError(f"port {port} is in use")
        self._handlers[port] = handler
        return MemoryListener(self, port)

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, Writer]:
        """See the protocol."""
        handler = self._handlers.get(port)
        if handler is None:
            raise ConnectionRefusedError(f"connection refused on port {port}")
        here, there = (asyncio.StreamReader(limit=LINE_BYTES_MAX) for _ in range(2))
        to_there, to_here = MemoryWriter(there), MemoryWriter(here)
        to_there.other, to_here.other = to_here, to_there
        served = asyncio.ensure_future(handler(there, to_here))
        self._served.add(served)
        served.add_done_callback(self._served.discard)
        return here, to_there

    def forget(self, port: int) -> None:
        """Remove the listener of a port."""
        del self._handlers[port]
