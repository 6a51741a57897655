"""Ports of loopback that fake workers listen at, and the connections that were made to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

HOST = "127.0.0.1"
BACKLOG = 1024


class Connection(Protocol):
    """What serves one connection."""

    def abort(self) -> None:
        """Close it at once."""


class Listeners:
    """Servers, from `open` to `close`."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._connections: WeakSet[Connection] = WeakSet()

    async def open(self, make: Callable[[], Connection]) -> int:
        """Listen; `make` serves each connection. Returns the port."""

        def accept() -> asyncio.BaseProtocol:
            connection = make()
            self._connections.add(connection)
            return connection  # type: ignore[return-value]

        server = await asyncio.get_running_loop().create_server(accept, HOST, 0, backlog=BACKLOG)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Listen no more, and drop all connections."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.abort()
        # Their sockets are closed in the next turn of the loop.
        await asyncio.sleep(0)
