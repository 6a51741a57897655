"""Base of both servers: services by name, health, reflection and ProcessService.

Owns the list of services and the health state. Each server owns its listener and transport.
"""

from __future__ import annotations

import abc
import asyncio
import ipaddress
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from tandem.api.process.v1.process_service_pb2_grpc import add_ProcessServiceServicer_to_server
from tandem.domain.network_address import bare_host, join_address
from tandem.errors import StartError
from tandem.rpc.handler_guard import HandlerGuard
from tandem.rpc.listening import check_listenable
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.rpc.process_servicer import ProcessServicer

log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

HEADERS_BYTES_MAX = 64 * 1024
"""Limit of one call's headers. gRPC's default rejects calls over 8 KiB at random, and the edge sends a path twice."""

AddServicer = Callable[[Any], None]
"""A generated `add_XServicer_to_server` with its servicer bound; called with a gRPC server or a look-alike."""


class ServiceHost(abc.ABC):
    """A server with health (NOT_SERVING until `set_serving`), reflection and ProcessService."""

    def __init__(self, registry: Any, guard: HandlerGuard, services: Sequence[tuple[str, AddServicer]]) -> None:
        """`registry` takes the handlers; it is a grpc.aio.Server or a look-alike."""
        self._registry = registry
        self._names: list[str] = []
        self._health: Any = health.aio.HealthServicer()
        self._setting = asyncio.Lock()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registry)
        self.process = ProcessServicer(guard.calls)
        self.add(PROCESS_SERVICE_NAME, partial(add_ProcessServiceServicer_to_server, self.process))
        for name, add in services:
            self.add(name, add)
        self.port = 0

    def add(self, name: str, add_servicer: AddServicer) -> None:
        """Add a service. Only before `serve`."""
        self._names.append(name)
        add_servicer(self._registry)

    def bind(self, host: str, port: int) -> None:
        """Bind the port; `self.port` is the actual one (chosen by the OS for 0). Calls are not served yet.

        Raises:
            StartError: the address cannot be listened on, or a TLS file is unusable.
        """
        check_listenable(host, port)
        try:
            self.port = self._add_port(host, port)
        except (RuntimeError, OSError):
            raise StartError(
                f"cannot listen on {join_address(host, port)}: the port is in use or not allowed"
            ) from None

    async def serve(self) -> None:
        """Serve calls on the bound port."""
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        servicer = reflection.aio.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, self._registry)
        await self.set_serving(False)
        await self._begin()

    async def start(self, host: str, port: int) -> None:
        """`bind` and `serve`."""
        self.bind(host, port)
        await self.serve()

    async def set_serving(self, serving: bool, *, works: bool | None = None, idle: Collection[str] = ()) -> None:
        """Report to health checkers and watchers, for the process as a whole ("") and for each service.

        Args:
            serving: whether requests should be sent here.
            works: reported for ProcessService: a process may work and not be ready for requests. None: as `serving`.
            idle: names of services that are never SERVING, whatever the process is.
        """
        # In turn: of two calls at once the later one holds for every name.
        async with self._setting:
            for name in ["", *self._names]:
                healthy = works if name == PROCESS_SERVICE_NAME and works is not None else serving
                healthy = healthy and name not in idle
                await self._health.set(name, SERVING if healthy else NOT_SERVING)

    @abc.abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Close the listener, give running calls `grace_s`, then cancel them. May be called twice."""

    @abc.abstractmethod
    def _add_port(self, host: str, port: int) -> int:
        """Bind the port; returns its number."""

    @abc.abstractmethod
    async def _begin(self) -> None:
        """Begin to serve calls."""


def warn_of_plaintext(host: str) -> None:
    """Log a warning where other machines can call without a certificate."""
    if not is_loopback(host):
        log.warning("listening on %s without TLS: unauthenticated access for every peer (see --tls-cert)", host)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach a listening address."""
    try:
        return ipaddress.ip_address(bare_host(host)).is_loopback
    except ValueError:
        return host == "localhost"
