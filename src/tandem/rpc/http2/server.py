"""The server on h2: the same surface as `tandem.rpc.server.RpcServer`, for streams of many small messages.

Owns the connections and the tasks of all calls, from the accepted socket to their end. It decides how many there
may be, and which one is closed when there are too many.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import grpc

from tandem.errors import TandemError
from tandem.rpc.channels import MESSAGE_BYTES_MAX
from tandem.rpc.credentials import ServerContexts
from tandem.rpc.handler_guard import Handler, HandlerGuard
from tandem.rpc.http2 import limits
from tandem.rpc.http2.connection import Connection
from tandem.rpc.http2.listener import Listener, LocalListener
from tandem.rpc.http2.methods import Methods
from tandem.rpc.http2.pace import MessageMemory
from tandem.rpc.service_host import AddServicer, ServiceHost, warn_of_plaintext
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

CANCELLED_TIMEOUT_S = 10.0
"""Most time for handlers that were cancelled to come to their end."""
LOG_FULL_EVERY_S = 10.0
FLUSH_TIMEOUT_S = 1.0
"""Most time for the last bytes of all connections to leave."""


class Http2RpcServer(ServiceHost):
    """A gRPC server on asyncio, with h2 for the protocol."""

    def __init__(
        self,
        services: Sequence[tuple[str, AddServicer]] = (),
        *,
        request_bytes_max: int = MESSAGE_BYTES_MAX,
        tls: Tls | None = None,
        streams_max: int = limits.STREAMS_MAX,
        connections_max: int = limits.CONNECTIONS_MAX,
    ) -> None:
        """Each service is its full protobuf name and the function that adds its servicer to a server.

        A request of more than `request_bytes_max` is refused before it has come. With `tls` every caller must present
        a certificate, of health and reflection too. `streams_max` calls may be open on one connection.
        """
        guard = HandlerGuard(request_bytes_max)
        self.methods = Methods(guard)
        self.held = MessageMemory(limits.held_bytes_max(request_bytes_max))
        """Of requests that are not whole."""
        self.unsent = MessageMemory(limits.UNSENT_BYTES_MAX)
        """Of messages that wait for their peers."""
        self.request_bytes_max = request_bytes_max
        self.streams_max = streams_max
        self._calls = guard.calls
        self._connections_max = connections_max
        self._tls = tls
        self._contexts: ServerContexts | None = None
        self._listener: Listener | None = None
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}
        """Connections whose handshake is not over, the oldest first."""
        self._connections: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._log_full_after_s = 0.0
        self.is_stopping = False
        self.on_connection_end: Callable[[], None] = lambda: None
        """Called when there is one connection less."""
        self._changed = asyncio.Event()
        """Set when a connection or a task has ended."""
        super().__init__(self, guard, services)

    # What generated code calls.

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As grpc.aio.Server does."""
        self.methods.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """As grpc.aio.Server does."""
        self.methods.add_registered_method_handlers(service_name, method_handlers)

    # Admission of connections.

    def serve_socket(self, connection: socket.socket) -> None:
        """Answer on a connection that was accepted elsewhere, with TLS where this server has it. Takes the socket."""
        if self.is_stopping or not self._has_room():
            connection.close()
            return
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = None if self._contexts is None else self._contexts.current()
        task = asyncio.get_running_loop().create_task(self._handshake(connection, context))
        self._handshakes[task] = connection
        task.add_done_callback(self._handshake_done)

    @property
    def connection_count(self) -> int:
        """Connections that are open, those whose handshake is not over among them."""
        return len(self._connections) + len(self._handshakes)

    @property
    def unread_calls(self) -> Mapping[str, int]:
        """By account, calls whose handlers have ended and whose clients have more than `STREAM_UNSENT_BYTES_MAX` to
        read.
        """
        return self.unsent.unread

    @property
    def open_call_count(self) -> int:
        """Calls of our own services that are open on them."""
        return self._calls.count

    def release(self, count: int) -> None:
        """Let clients of so many connections connect anew, those with the most calls first; what runs goes on."""
        staying = [connection for connection in self._connections if not connection.is_leaving]
        for connection in sorted(staying, key=lambda one: one.call_count, reverse=True)[:count]:
            connection.leave()

    def bind_local(self, path: Path) -> None:
        """Take a path instead of a port.

        Raises:
            OSError: it cannot be listened on.
        """
        self._listener = LocalListener(path)

    def _add_port(self, host: str, port: int) -> int:
        self._open_tls()
        if self._contexts is None:
            warn_of_plaintext(host)
        self._listener = Listener(host, port)
        return self._listener.port

    def _open_tls(self) -> None:
        if self._tls is not None and self._contexts is None:
            self._contexts = ServerContexts(self._tls)
            log.info("callers must present a certificate; this process presents %r", self._contexts.material)

    async def _begin(self) -> None:
        self._open_tls()
        if self._listener is not None:
            self._listener.begin(self.serve_socket)

    async def _handshake(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        timeouts = {}
        if context is not None:
            timeouts = {
                "ssl_handshake_timeout": limits.HANDSHAKE_TIMEOUT_S,
                "ssl_shutdown_timeout": limits.CLOSE_TIMEOUT_S,
            }
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self), connection, ssl=context, **timeouts
            )
        except OSError as problem:
            # ssl.SSLError is one: no certificate, another CA, plaintext. What it says is the peer's.
            log.debug("a connection failed before it could be used: %s", problem)
            connection.close()

    def _handshake_done(self, task: asyncio.Task[None]) -> None:
        connection = self._handshakes.pop(task)
        self._changed.set()
        if task.cancelled():
            # It may have been cancelled before it began: no transport owns the socket then.
            connection.close()
        elif task.exception() is not None:
            log.error(
                "bug in this server in a connection's handshake: closing the connection; others are not affected",
                exc_info=task.exception(),
            )
            connection.close()
        self.on_connection_end()

    def _has_room(self) -> bool:
        """Whether one more connection is accepted; an idle one is closed for it."""
        if len(self._connections) + len(self._handshakes) < self._connections_max:
            return True
        if self._end_handshake():
            return True
        connection = self._least_needed()
        if connection is not None:
            del self._connections[connection]
            connection.leave(at_once=True)
            return True
        self._log_full()
        return False

    def _least_needed(self) -> Connection | None:
        """A connection without a call: the oldest that has never had one, else the one that has been silent longest.

        Not the latter while there are handshakes: of many that come at once, the next turn has some without a call.
        """
        idle = [connection for connection in self._connections if not connection.call_count]
        unused = next((connection for connection in idle if not connection.was_used), None)
        if unused is not None or self._handshakes:
            return unused
        return min(idle, key=lambda connection: connection.heard_s, default=None)

    def _log_full(self) -> None:
        """At most one line each 10 s: connections that are refused must not fill the log."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._log_full_after_s:
            self._log_full_after_s = now_s + LOG_FULL_EVERY_S
            log.warning(
                "refused a connection: %d are open, which is the limit, and none is idle", len(self._connections)
            )

    def _end_handshake(self) -> bool:
        """Give up the oldest handshake. Returns whether there was one.

        Without TLS there is none: such a connection is there a turn later, and uvloop forgets it if its task is
        cancelled in between.
        """
        for task in self._handshakes if self._contexts is not None else ():
            if not task.cancelling():
                task.cancel()
                return True
        return False

    # What connections call: `tandem.rpc.http2.connection.Server`.

    def joined(self, connection: Connection) -> None:
        """A connection can be used."""
        self._connections[connection] = None

    def left(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.pop(connection, None)
        self._changed.set()
        self.on_connection_end()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a call's task until it has ended."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.is_stopping:
            self._changed.set()

    def count_failure(self, error: TandemError) -> None:
        """A call was refused before its handler saw it."""
        self._calls.failures[error.reason] += 1

    # How it ends.

    async def stop(self, grace_s: float) -> None:
        """Close the listener, give running calls `grace_s`, then cancel them. May be called twice.

        Returns when every handler has ended.
        """
        self.is_stopping = True
        if self._listener is not None:
            self._listener.close()
        while self._end_handshake():
            pass
        for connection in list(self._connections):
            connection.leave()
        await self._wait_gone(grace_s)
        for connection in list(self._connections):
            connection.cut(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=CANCELLED_TIMEOUT_S)
            if left:
                log.error(
                    "%d handlers have not ended within %g s: their calls are cut",
                    len(left),
                    CANCELLED_TIMEOUT_S,
                )
        await self._wait_gone(FLUSH_TIMEOUT_S)
        for connection in list(self._connections):
            connection.abort()
        await self._wait_gone(FLUSH_TIMEOUT_S)

    async def _wait_gone(self, timeout_s: float) -> None:
        """Return when all connections and calls have ended, at the latest after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._connections or self._tasks or self._handshakes:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
