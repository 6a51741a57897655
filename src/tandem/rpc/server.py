"""Server side of gRPC: every Tandem process serves through this shape, with health and reflection.

Owns the listener, who may connect to it, and the health state. Knows nothing of the services it carries.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.api.process.v1.process_service_pb2_grpc import add_ProcessServiceServicer_to_server
from tandem.errors import StartError
from tandem.rpc.channels import MESSAGE_BYTES_MAX
from tandem.rpc.credentials import ServerCredentials
from tandem.rpc.interceptors import ErrorInterceptor
from tandem.rpc.listening import check_listenable
from tandem.rpc.process_figures import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.rpc.process_figures import ProcessServicer
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

HEADERS_BYTES_MAX = 64 * 1024
CANCELLED_TIMEOUT_S = 1.0
"""Most time for calls that were cancelled to come to their end."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # By default a call with more than 8 KiB of headers is refused at random, and the edge carries a path twice.
    ("grpc.max_metadata_size", HEADERS_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", HEADERS_BYTES_MAX),
    # Two processes on one port would share its connections at random; the second must fail instead.
    ("grpc.so_reuseport", 0),
    # Peers ping every 10 s (channels.py); less than this is answered with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

RECEIVED_FACTOR, RECEIVED_BYTES_MIN = 2, 16 * 2**20
"""So many times the bytes of the longest request are received at all, and never less than the edge lets through: up to
there a refusal is typed, and beyond it is gRPC's own RESOURCE_EXHAUSTED, which names nothing."""

AddServicer = Callable[[grpc.aio.Server], None]


class RpcServer:
    """A gRPC server with health (NOT_SERVING until told otherwise), reflection and the figures of its process."""

    def __init__(
        self,
        services: Sequence[tuple[str, AddServicer]] = (),
        *,
        request_bytes_max: int = MESSAGE_BYTES_MAX,
        tls: Tls | None = None,
    ) -> None:
        """Each service is its full protobuf name and the function that adds its servicer to a server.

        A request of more than `request_bytes_max` is refused before it is parsed. With `tls` every caller must present
        a certificate, of health and reflection too.
        """
        self._tls = tls
        self._credentials: ServerCredentials | None = None
        self._names: list[str] = []
        received_bytes_max = max(RECEIVED_BYTES_MIN, RECEIVED_FACTOR * request_bytes_max)
        interceptor = self._interceptor = ErrorInterceptor(request_bytes_max)
        self._server = grpc.aio.server(
            interceptors=[interceptor],
            options=(*OPTIONS, ("grpc.max_receive_message_length", received_bytes_max)),
        )
        self._health: Any = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        figures = ProcessServicer(interceptor.calls)
        self.add(PROCESS_SERVICE_NAME, partial(add_ProcessServiceServicer_to_server, figures))
        for name, add in services:
            self.add(name, add)
        self.port = 0

    def add(self, name: str, add_servicer: AddServicer) -> None:
        """Carry one more service. Before `serve` only."""
        self._names.append(name)
        add_servicer(self._server)

    def bind(self, host: str, port: int) -> None:
        """Take the port; `self.port` is the one in use (the OS chooses when 0 is given). Answers nothing yet.

        Raises:
            StartError: the address cannot be listened on, or a file of `tls` cannot be used.
        """
        check_listenable(host, port)
        try:
            self.port = self._add_port(host, port)
        except RuntimeError:
            raise StartError(f"cannot listen on {host}:{port}: the port is in use or not allowed") from None

    def _add_port(self, host: str, port: int) -> int:
        if self._tls is None:
            if not is_loopback(host):
                log.warning("listening on %s without TLS: whoever reaches this port is served (see --tls-cert)", host)
            return self._server.add_insecure_port(f"{host}:{port}")
        credentials = self._credentials = ServerCredentials(self._tls)
        log.info("callers must present a certificate; this process presents %r", credentials.material)
        return self._server.add_secure_port(f"{host}:{port}", credentials.grpc)

    async def serve(self) -> None:
        """Answer calls on the port taken."""
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self.set_serving(False)
        await self._server.start()

    async def start(self, host: str, port: int) -> None:
        """`bind` and `serve`."""
        self.bind(host, port)
        await self.serve()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checkers and watchers, for the process as a whole ("") and for each service."""
        for name in ["", *self._names]:
            await self._health.set(name, SERVING if serving else NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Close the listener, give running calls `grace_s`, then cancel them. May be called twice.

        gRPC cancels them and does not wait: where the loop ended first, it logged an error for each, and that was the
        last line of a process that had said why it ended.
        """
        await self._server.stop(grace_s)
        await self._interceptor.wait_ended(CANCELLED_TIMEOUT_S)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach that listening address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
