"""The gRPC server of workers and registries, on grpc.aio, with health and reflection.

Owns the listener and its TLS. Knows nothing of the services on it. The frontend's server, for streams of many small
messages, is `tandem.rpc.http2`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from tandem.domain.network_address import join_address
from tandem.rpc.channels import MESSAGE_BYTES_MAX
from tandem.rpc.credentials import ServerCredentials
from tandem.rpc.handler_guard import Handler, HandlerGuard
from tandem.rpc.service_host import HEADERS_BYTES_MAX, AddServicer, ServiceHost, warn_of_plaintext
from tandem.tls.paths import Tls

__all__ = ["AddServicer", "RpcServer"]

log = logging.getLogger(__name__)

CANCELLED_TIMEOUT_S = 1.0
"""How long `stop` waits for cancelled calls to end."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", HEADERS_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", HEADERS_BYTES_MAX),
    # A second process on the port must fail to start, not get a random part of the connections.
    ("grpc.so_reuseport", 0),
    # Peers ping every 10 s (channels.py). Pings in shorter intervals get GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

RECEIVED_FACTOR, RECEIVED_BYTES_MIN = 2, 16 * 2**20
"""gRPC's own size limit, as a multiple of ours, and never below the edge's. A request between the two limits is
rejected with a typed error; above, gRPC answers RESOURCE_EXHAUSTED, which names no field."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler of Tandem with `tandem.rpc.handler_guard`.

    Keeps the tasks that gRPC creates for its calls, so that a server can wait for their end.
    """

    def __init__(self, guard: HandlerGuard) -> None:
        self._guard = guard
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler; unknown methods and other services (health, reflection) pass unchanged."""
        self._keep(asyncio.current_task())
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guard.guarded(handler_call_details.method, handler)

    async def wait_ended(self, timeout_s: float) -> None:
        """Return when gRPC's own tasks of all calls have ended, or after `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _keep(self, task: asyncio.Task[Any] | None) -> None:
        """Called in the task that gRPC creates for each call."""
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class RpcServer(ServiceHost):
    """A grpc.aio server."""

    def __init__(
        self,
        services: Sequence[tuple[str, AddServicer]] = (),
        *,
        request_bytes_max: int = MESSAGE_BYTES_MAX,
        tls: Tls | None = None,
    ) -> None:
        """Create a server; nothing is bound yet.

        Args:
            services: full protobuf name of each, and the function that adds its servicer to a server.
            request_bytes_max: a larger request is rejected before it is parsed.
            tls: every caller must present a certificate, for health and reflection too; None: plaintext.
        """
        self._tls = tls
        self._credentials: ServerCredentials | None = None
        received_bytes_max = max(RECEIVED_BYTES_MIN, RECEIVED_FACTOR * request_bytes_max)
        guard = HandlerGuard(request_bytes_max)
        self._interceptor = ErrorInterceptor(guard)
        self._server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=(*OPTIONS, ("grpc.max_receive_message_length", received_bytes_max)),
        )
        super().__init__(self._server, guard, services)

    def _add_port(self, host: str, port: int) -> int:
        if self._tls is None:
            warn_of_plaintext(host)
            return self._server.add_insecure_port(join_address(host, port))
        credentials = self._credentials = ServerCredentials(self._tls)
        log.info("TLS: client certificates are required; own certificate: %r", credentials.material)
        return self._server.add_secure_port(join_address(host, port), credentials.grpc)

    async def _begin(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Close the listener, give running calls `grace_s`, then cancel them. May be called twice.

        gRPC does not wait for the cancelled calls. If the event loop ended before them, gRPC would log an error for
        each, after the line with the reason for the process's end.
        """
        await self._server.stop(grace_s)
        await self._interceptor.wait_ended(CANCELLED_TIMEOUT_S)
