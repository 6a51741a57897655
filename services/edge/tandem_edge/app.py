"""Composition root of the edge: which parts there are, and the order in which they start and stop.

Start: check settings, metrics, read keys, get the frontends from the registry if one is set, Envoy ready.
Drain: /healthz returns 503 while requests are still accepted -> settle -> no new connections -> wait for open requests.
Stop: the registry watch, Envoy, its files, metrics.
"""

from __future__ import annotations

import asyncio
import logging

from tandem.discovery.watches import FrontendWatch
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import open_metrics
from tandem_edge.config import EdgeConfig, check
from tandem_edge.discovery import Discovery
from tandem_edge.dns import Names
from tandem_edge.envoy_process import EnvoyProcess
from tandem_edge.keys import read_keys

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
ENVOY_PAGE = "/envoy"
"""Path of the metrics endpoint with Envoy's own metrics of requests and frontends."""


class EdgeApp:
    """The edge as `tandem.service.process` runs it."""

    def __init__(self, config: EdgeConfig) -> None:
        """Check the settings.

        Raises:
            ConfigError: names the key.
        """
        check(config)
        self._config = config
        keys = read_keys(config.api_keys) if config.api_keys is not None else ()
        if not keys:
            log.warning("no API keys (api_keys): unauthenticated access on %s", config.host)
        self._envoy = EnvoyProcess(config, keys)
        self._discovery: Discovery | None = None
        self._port = 0
        pages = {ENVOY_PAGE: lambda: self._envoy.admin.prometheus_text()}
        self._metrics = open_metrics(config, Emitter.EDGE, "tandem-edge", config.registry_tls, pages)

    @property
    def address(self) -> str:
        """host:port it serves on. Valid after `start`."""
        assert self._port, "address before start()"
        host = self._config.reachable_host
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint, after `start`; 0: there is none."""
        return self._metrics.port

    async def start(self) -> None:
        """Return when requests are accepted.

        Raises:
            StartError: the start failed; the message says why.
        """
        await self._metrics.start(f"edge-{self._config.reachable_host}-{self._config.port}")
        if self._config.registry is None:
            await self._envoy.start()
        else:
            watch = FrontendWatch(self._config.registry, tls=self._config.registry_tls)
            self._discovery = Discovery(watch, Names(), self._config.dns_refresh_s)
            await self._envoy.start(await self._discovery.first())
            self._discovery.follow(self._envoy.set_endpoints)
        self._port = await self._envoy.admin.port()

    async def drain(self) -> bool:
        """See the module. Returns whether every request finished within drain_timeout_s."""
        try:
            return await self._drained()
        except OSError as problem:
            log.error("Envoy exited before its open requests finished: %s", problem)
            return False

    async def _drained(self) -> bool:
        admin = self._envoy.admin
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

    async def stop(self) -> None:
        """Free all resources, also when `start` failed."""
        if self._discovery is not None:
            await self._discovery.stop()
        await self._envoy.stop()
        await self._metrics.stop()

    async def wait_finished(self) -> str | None:
        """Return the reason when Envoy has exited. An unexpected exception of the discovery task is raised."""
        ended = asyncio.ensure_future(self._envoy.wait_ended())
        followed = [] if self._discovery is None else [self._discovery.following]
        try:
            await asyncio.wait([ended, *followed], return_when=asyncio.FIRST_COMPLETED)
            for task in followed:
                if task.done():
                    await task
            return f"Envoy exited with status {await ended}"
        finally:
            ended.cancel()
