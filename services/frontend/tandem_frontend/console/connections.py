"""The connections of the console's listener: how many there may be, and which one makes room for another.

A connection without a call costs its client nothing, so a few of them must not keep operators out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from typing import cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

CONNECTIONS_MAX = 64
"""A browser opens six at most."""


class Connections:
    """The connections of one listener."""

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._busy: set[asyncio.BaseProtocol] = set()
        """Those with a call that runs."""
        self._ended: dict[asyncio.BaseProtocol, int] = {}
        """Of those that had a call: which number of all calls ended last on each."""
        self._numbers = itertools.count(1)

    def accept(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection.

        At the limit, the connection that has waited longest without a call is closed for it: first those that never
        had one, then by the end of the last call. Where every connection has a call, the new one is closed.
        """
        held = [one for one in self._server.connections if one.transport is not None]
        if len(held) < CONNECTIONS_MAX:
            return self._server()
        waiting: list[RequestHandler] = [one for one in held if one not in self._busy]
        if not waiting:
            return _Refusal()
        min(waiting, key=lambda one: self._ended.get(one, 0)).force_close()
        return self._server()

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


class _Refusal(asyncio.Protocol):
    """Closes a connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's.
        cast("asyncio.Transport", transport).abort()
