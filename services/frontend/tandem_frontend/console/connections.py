"""The connections of the console's listener: how many there may be, and which one makes room for another.

A connection without a call costs its client nothing, so a few of them must not keep operators out. It accepts by
itself: a server of asyncio shows a connection with TLS only after the handshake, and many unfinished ones cost memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import ssl
from collections.abc import Iterator, Sequence

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
"""A browser opens six at most. Those whose TLS handshake is not finished count too."""
HANDSHAKE_S = 10.0
"""Of TLS."""
SHUTDOWN_S = 1.0
"""Of TLS: for so long a closed connection waits for its client to close too."""
ACCEPT_PAUSE_S = 0.5
"""After a failed accept: the process may have too many open files."""


class Connections:
    """The connections of one listener."""

    def __init__(self, server: web.Server, context: ssl.SSLContext | None = None) -> None:
        """`context`: of TLS; None: plaintext."""
        self._server = server
        self._context = context
        self._accepting: list[asyncio.Task[None]] = []
        self._opening: dict[RequestHandler, asyncio.Task[None]] = {}
        """Those that are accepted and not open yet."""
        self._numbers = itertools.count(1)
        self._arrived: dict[asyncio.BaseProtocol, int] = {}
        """Which number each connection was."""
        self._busy: set[asyncio.BaseProtocol] = set()
        """Those with a call that runs."""
        self._ended: dict[asyncio.BaseProtocol, int] = {}
        """Of those that had a call: which number of all calls ended last on each."""

    def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections of these listening sockets, until `close`."""
        self._accepting = [asyncio.create_task(self._accept(one), name="console accepts") for one in sockets]

    async def close(self) -> None:
        """Accept no more, and end those that are not open yet."""
        tasks = [*self._accepting, *self._opening.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as problem:
                log.warning("the console cannot accept a connection: %s", problem)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            self._admit(accepted)
            # Accepting does not wait where connections are pending: others run in between.
            await asyncio.sleep(0)

    def _admit(self, accepted: socket.socket) -> None:
        """Open a new connection.

        At the limit, the connection that has waited longest without a call is closed for it: first those that never
        had one, then by the end of the last call. Where every connection has a call, the new one is closed.
        """
        held = self._held()
        self._arrived = {one: number for one, number in self._arrived.items() if one in held}
        if len(held) >= CONNECTIONS_MAX:
            waiting = [one for one in held if one not in self._busy]
            if not waiting:
                accepted.close()
                return
            self._end(min(waiting, key=lambda one: (self._ended.get(one, 0), self._arrived.get(one, 0))))
        handler = self._server()
        self._arrived[handler] = next(self._numbers)
        self._opening[handler] = asyncio.create_task(self._open(handler, accepted), name="console opens")

    def _held(self) -> set[RequestHandler]:
        return {one for one in self._server.connections if one.transport is not None} | self._opening.keys()

    def _end(self, handler: RequestHandler) -> None:
        opening = self._opening.pop(handler, None)
        if opening is not None:
            opening.cancel()
        transport = handler.transport
        handler.force_close()
        if transport is not None:
            # To close TLS would wait for the client.
            transport.abort()

    async def _open(self, handler: RequestHandler, accepted: socket.socket) -> None:
        times = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": SHUTDOWN_S} if self._context else {}
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: handler, accepted, ssl=self._context, **times)
        except OSError:
            # The client is gone, speaks no TLS, or was too slow.
            accepted.close()
        finally:
            self._opening.pop(handler, None)

    @contextlib.contextmanager
    def calling(self, protocol: asyncio.BaseProtocol) -> Iterator[None]:
        """A connection has a call while the context is open."""
        self._busy.add(protocol)
        try:
            yield
        finally:
            self._busy.discard(protocol)
            held = set(self._server.connections)
            self._ended = {one: number for one, number in self._ended.items() if one in held}
            if protocol in held:
                self._ended[protocol] = next(self._numbers)
