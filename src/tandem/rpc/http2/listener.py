"""A listening socket, and the connections that come to it.

Owns the socket from `bind` on: the kernel lets clients wait there until they are accepted. What becomes of a
connection is the server's business.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.domain.network_address import bare_host

log = logging.getLogger(__name__)

WAITING_MAX = 1_024
"""Connections that the kernel keeps until they are accepted."""
TURN_COUNT = 64
"""Accepted in one turn of the loop."""
PAUSE_S = 0.5
"""How long a process that can open no more files accepts no connection."""
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Listens from the start, accepts from `begin` on."""

    def __init__(self, host: str, port: int) -> None:
        """Take the address.

        Raises:
            OSError: it cannot be listened on.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        # Not SO_REUSEPORT: two processes on one port would share its connections; the second must fail instead.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._listen(listening, address)
        self.port: int = self._socket.getsockname()[1]

    def _listen(self, listening: socket.socket, address: Any) -> None:
        self._socket = listening
        try:
            listening.bind(address)
            listening.setblocking(False)
            listening.listen(WAITING_MAX)
        except OSError:
            listening.close()
            raise
        self._take: Callable[[socket.socket], None]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._is_paused = False

    def begin(self, take: Callable[[socket.socket], None]) -> None:
        """Accept connections and hand each to `take`."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    def pause(self) -> None:
        """Leave new connections in the kernel's queue until `resume`."""
        self._is_paused = True
        if self._loop is not None:
            self._loop.remove_reader(self._socket)

    def resume(self) -> None:
        """Accept again."""
        self._is_paused = False
        if self._loop is not None:
            self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Accept no more connections. May be called twice."""
        if self._pause is not None:
            self._pause.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop = None
        self._socket.close()

    def _accept(self) -> None:
        for _ in range(TURN_COUNT):
            if self._is_paused:
                return
            try:
                connection, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as problem:
                if problem.errno not in SHORTAGES:
                    raise
                self._accept_later(problem)
                return
            self._take(connection)

    def _accept_later(self, problem: OSError) -> None:
        assert self._loop is not None
        log.warning(
            "cannot accept a connection, open ones are not affected; retrying in %g s: %s", PAUSE_S, problem.strerror
        )
        self._loop.remove_reader(self._socket)
        self._pause = self._loop.call_later(PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        if self._loop is not None and not self._is_paused:
            self._loop.add_reader(self._socket, self._accept)


class LocalListener(Listener):
    """The same at a path, for processes of this machine that may enter its directory."""

    def __init__(self, path: Path) -> None:
        """Bind the path; a socket file that an earlier process left there is removed.

        Raises:
            OSError: it cannot be listened on.
        """
        path.unlink(missing_ok=True)
        self._listen(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(path))
        self.port = 0
