"""Composition root of the registry: which parts there are, and the order in which they start and stop.

Start: metrics, port, backend, server, health SERVING as soon as there is a view. Drain: withdraw from discovery, health
NOT_SERVING while calls are still answered, then close all streams. Stop: backend, server, metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from tandem.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from tandem.domain.network_address import join_address
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Metrics, open_metrics
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem_registry.adapter_changes import AdapterChanges
from tandem_registry.backends.memory import MemoryBackend
from tandem_registry.backends.port import Backend
from tandem_registry.config import RegistryConfig
from tandem_registry.gauges import RegistryGauges
from tandem_registry.role_changes import RoleChanges
from tandem_registry.servicer import SERVICE_NAME, RegistryServicer

STOP_GRACE_S = 0.2
"""For the last bytes: the status that closes each stream."""
REQUEST_BYTES_MAX = 2**20
"""Of one request; a worker's registration has fewer than a thousand."""


class RegistryApp:
    """A serving registry, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(
        self, config: RegistryConfig, metrics: Metrics, backend: Backend, servicer: RegistryServicer, server: RpcServer
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._backend = backend
        self._servicer = servicer
        self._server = server

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: RegistryConfig) -> AsyncIterator[RegistryApp]:
        """Start a registry, and stop it on exit. Calls are answered; health is SERVING once there is a view.

        Raises:
            StartError: a port is in use, a TLS file is unusable, or the store rejects this registry.
        """
        async with contextlib.AsyncExitStack() as stack:
            metrics = open_metrics(config, Emitter.REGISTRY, "tandem-registry", config.tls)
            stack.push_async_callback(metrics.stop)
            backend = _make_backend(config)
            metrics.measure(RegistryGauges(backend).read)
            channels = Channels(config.tls)
            stack.push_async_callback(channels.close)
            servicer = RegistryServicer(backend, RoleChanges(backend, channels), AdapterChanges(backend, channels))
            services = [(SERVICE_NAME, partial(add_RegistryServiceServicer_to_server, servicer))]
            server = RpcServer(services, request_bytes_max=REQUEST_BYTES_MAX, tls=config.tls)
            stack.push_async_callback(server.stop, STOP_GRACE_S)
            server.bind(config.host, config.port)
            app = cls(config, metrics, backend, servicer, server)
            await metrics.start(app.address)
            stack.push_async_callback(app._end_streams)
            await backend.start(app.address)
            await server.serve()
            if backend.has_view:
                await server.set_serving(True)
            yield app

    @property
    def address(self) -> str:
        """host:port it serves on."""
        return join_address(self._config.reachable_host, self._server.port)

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: there is none."""
        return self._metrics.port

    async def drain(self) -> bool:
        """Withdraw from discovery, wait the settle time for clients to move to another registry, close all streams."""
        self._metrics.count("tandem.drains")
        await self._backend.withdraw()
        await self._server.set_serving(False)
        await asyncio.sleep(self._config.drain_settle_s)
        await self._end_streams()
        return True

    async def wait_finished(self) -> str | None:
        """Return why leases are no longer expired. Sets health SERVING meanwhile, when the first view arrives late."""
        first_view = asyncio.create_task(self._serve_with_view(), name="first-view")
        try:
            return await self._backend.wait_failed()
        finally:
            first_view.cancel()

    async def _serve_with_view(self) -> None:
        """Health stays NOT_SERVING without a view: a client that found this registry would get nothing from it."""
        if not self._backend.has_view:
            await self._backend.wait_view()
            await self._server.set_serving(True)

    async def _end_streams(self) -> None:
        self._servicer.end_keep_alives()
        await self._backend.withdraw()
        await self._backend.close()


def _make_backend(config: RegistryConfig) -> Backend:
    """The backend that the settings select, not started. Imports the Consul client only when Consul is used."""
    if config.backend == "memory":
        return MemoryBackend(config.lease_ttl_s)
    from tandem_registry.backends.consul.backend import ConsulBackend
    from tandem_registry.backends.consul.settings import ConsulSettings

    settings = ConsulSettings(
        address=config.consul_address,
        service=config.consul_service,
        token="" if config.consul_token is None else config.consul_token.get_secret_value(),
        token_file=config.consul_token_file,
        ca=config.consul_ca,
        cert=config.consul_cert,
        key=config.consul_key,
        has_checks=config.consul_checks,
    )
    return ConsulBackend(settings, config.lease_ttl_s, checks_tls=config.tls is not None)
