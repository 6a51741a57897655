"""Composition root of the edge: which parts there are, and the order in which they start and stop.

Start: check settings, metrics, keys, get the frontends from the registry if one is set, Envoy ready.
Drain: /healthz returns 503 while requests are still accepted -> settle -> no new connections -> wait for open requests.
Stop: the registry watch, Envoy, its files, metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from tandem.discovery.watches import FrontendWatch
from tandem.domain.network_address import join_address
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Metrics, open_metrics
from tandem.service.background import BackgroundTasks
from tandem_edge.config import EdgeConfig, check
from tandem_edge.connection_pressure import ConnectionPressure
from tandem_edge.discovery import Discovery
from tandem_edge.dns import Names
from tandem_edge.endpoints import Endpoint
from tandem_edge.envoy_admin import Admin
from tandem_edge.envoy_process import EnvoyProcess, private_files
from tandem_edge.key_watch import KeyWatch

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
ENVOY_PAGE = "/envoy"
"""Path of the metrics endpoint with Envoy's own metrics of requests and frontends."""


class EdgeApp:
    """A serving edge, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(
        self,
        config: EdgeConfig,
        port: int,
        metrics: Metrics,
        admin: Admin,
        envoy: EnvoyProcess,
        following: asyncio.Task[None] | None,
    ) -> None:
        """`following` is the task of the discovery; None: the settings list the frontends."""
        self.address = join_address(config.reachable_host, port)
        """host:port it serves on."""
        self._config = config
        self._metrics = metrics
        self._admin = admin
        self._envoy = envoy
        self._following = following

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: EdgeConfig) -> AsyncIterator[EdgeApp]:
        """Start an edge that accepts requests, and stop it on exit.

        Raises:
            ConfigError: names the key.
            StartError: the start failed; the message says why.
        """
        check(config)
        key_watch = None if config.api_keys is None else KeyWatch(config.api_keys)
        keys = () if key_watch is None else key_watch.first()
        if not keys:
            log.warning("no API keys (api_keys): unauthenticated access on %s", config.host)
        async with contextlib.AsyncExitStack() as stack:
            files = stack.enter_context(private_files())
            admin = Admin(files.admin_socket)
            pages = {ENVOY_PAGE: admin.prometheus_text}
            metrics = open_metrics(config, Emitter.EDGE, "tandem-edge", config.registry_tls, pages)
            stack.push_async_callback(metrics.stop)
            await metrics.start(f"edge-{config.reachable_host}-{config.port}")
            discovery, following = None, None
            endpoints: tuple[Endpoint, ...] = ()
            if config.registry is not None:
                watch = FrontendWatch(config.registry, tls=config.registry_tls)
                discovery = Discovery(watch, Names(), config.dns_refresh_s)
                stack.push_async_callback(discovery.stop)
                endpoints = await discovery.first()
            envoy = await stack.enter_async_context(EnvoyProcess.open(config, keys, files, endpoints))
            tasks = await stack.enter_async_context(BackgroundTasks())
            pressure = ConnectionPressure(admin.connections, envoy.set_connection_pressure, config.connections_max)
            tasks.start(pressure.follow(), "connection pressure")
            if key_watch is not None:
                tasks.start(key_watch.follow(envoy.set_keys), "API keys")
            if discovery is not None:
                # Before Envoy, whose files it writes.
                stack.push_async_callback(discovery.stop)
                following = discovery.follow(envoy.set_endpoints)
            yield cls(config, await admin.port(), metrics, admin, envoy, following)

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: there is none."""
        return self._metrics.port

    async def drain(self) -> bool:
        """See the module. Returns whether every request finished within drain_timeout_s."""
        try:
            return await self._drained()
        except OSError as problem:
            log.error("Envoy exited before its open requests finished: %s", problem)
            return False

    async def _drained(self) -> bool:
        admin = self._admin
        self._metrics.count("tandem.drains")
        await admin.announce_end()
        await asyncio.sleep(self._config.drain_settle_s)
        await admin.close_listener()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                # Polled: Envoy's admin interface does not push its counters.
                while await admin.open_requests():  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            log.error("requests still open after %g s (drain_timeout_s): aborting them", self._config.drain_timeout_s)
            return False
        return True

    async def wait_finished(self) -> str | None:
        """Return the reason when Envoy has exited. An unexpected exception of the discovery task is raised."""
        ended = asyncio.ensure_future(self._envoy.wait_ended())
        followed = [] if self._following is None else [self._following]
        try:
            await asyncio.wait([ended, *followed], return_when=asyncio.FIRST_COMPLETED)
            for task in followed:
                if task.done():
                    await task
            return f"Envoy exited with status {await ended}"
        finally:
            ended.cancel()
