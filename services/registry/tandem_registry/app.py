"""Composition root of the registry: which parts there are, and the order in which they start and stop.

Start: metrics, port, backend, server, health SERVING as soon as there is a view. Drain: withdraw from discovery, health
NOT_SERVING while calls are still answered, then close all streams. Stop: backend, server, metrics.
"""

from __future__ import annotations

import asyncio

from tandem.api.registry.v1 import registry_service_pb2_grpc
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import open_metrics
from tandem.rpc.server import RpcServer
from tandem_registry.backends.factory import open_backend
from tandem_registry.backends.port import Backend
from tandem_registry.config import RegistryConfig
from tandem_registry.gauges import RegistryGauges
from tandem_registry.servicer import SERVICE_NAME, RegistryServicer

STOP_GRACE_S = 0.2
"""For the last bytes: the status that closes each stream."""
REQUEST_BYTES_MAX = 2**20
"""Of one request; a worker's registration has fewer than a thousand."""


class RegistryApp:
    """The registry as `tandem.service.process` runs it."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self._backend: Backend | None = None
        self._servicer: RegistryServicer | None = None
        self._server: RpcServer | None = None
        self._metrics = open_metrics(config, Emitter.REGISTRY, "tandem-registry", config.tls)

    @property
    def address(self) -> str:
        """host:port it serves on. Valid after `start`."""
        assert self._server is not None, "address before start()"
        return f"{self._config.reachable_host}:{self._server.port}"

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint, after `start`; 0: there is none."""
        return self._metrics.port

    async def start(self) -> None:
        """Return when calls are answered; health is SERVING once there is a view."""
        self._backend = open_backend(self._config)
        self._metrics.measure(RegistryGauges(self._backend).read)
        servicer = self._servicer = RegistryServicer(self._backend)
        self._server = RpcServer(
            [
                (
                    SERVICE_NAME,
                    lambda server: registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server),
                )
            ],
            request_bytes_max=REQUEST_BYTES_MAX,
            tls=self._config.tls,
        )
        self._server.bind(self._config.host, self._config.port)
        await self._metrics.start(self.address)
        await self._backend.start(self.address)
        await self._server.serve()
        if self._backend.has_view:
            await self._server.set_serving(True)

    async def drain(self) -> bool:
        """Withdraw from discovery, wait the settle time for clients to move to another registry, close all streams."""
        assert self._server is not None, "drain() before start()"
        assert self._backend is not None
        self._metrics.count("tandem.drains")
        await self._backend.withdraw()
        await self._server.set_serving(False)
        await asyncio.sleep(self._config.drain_settle_s)
        await self._end_streams()
        return True

    async def stop(self) -> None:
        """Free all resources, also when `start` failed."""
        await self._end_streams()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self._metrics.stop()

    async def wait_finished(self) -> str | None:
        """Return why leases are no longer expired. Sets health SERVING meanwhile, when the first view arrives late."""
        assert self._backend is not None, "wait_finished() before start()"
        first_view = asyncio.create_task(self._serve_with_view(self._backend), name="first-view")
        try:
            return await self._backend.wait_failed()
        finally:
            first_view.cancel()

    async def _serve_with_view(self, backend: Backend) -> None:
        """Health stays NOT_SERVING without a view: a client that found this registry would get nothing from it."""
        assert self._server is not None
        if not backend.has_view:
            await backend.wait_view()
            await self._server.set_serving(True)

    async def _end_streams(self) -> None:
        if self._servicer is not None:
            self._servicer.end_keep_alives()
        if self._backend is not None:
            await self._backend.withdraw()
            await self._backend.close()
