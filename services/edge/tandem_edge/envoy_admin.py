"""Envoy's admin interface, over its unix domain socket: readiness, the port in use, open requests, draining.

Owns those requests. Only the user that runs the edge can connect to the socket.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from pathlib import Path

REQUEST_TIMEOUT_S = 5.0
LIVE = b"LIVE\n"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("admin", timeout=REQUEST_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_TIMEOUT_S)
        self.sock.connect(str(self._path))


class Admin:
    """One Envoy's admin interface."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def is_ready(self) -> bool:
        """Whether it accepts requests: its listeners are open, and every frontend's health has been checked once."""
        try:
            return await self._request("GET", "/ready") == LIVE
        except OSError:
            return False

    async def port(self) -> int:
        """The port it listens on."""
        listeners = json.loads(await self._request("GET", "/listeners?format=json"))
        return int(listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"])

    async def connections(self) -> int:
        """Number of open connections of clients."""
        return await self._gauge("http.edge.downstream_cx_active")

    async def open_requests(self) -> int:
        """Number of client requests that have not finished."""
        return await self._gauge("http.edge.downstream_rq_active")

    def prometheus_text(self) -> bytes:
        """Envoy's metrics in Prometheus' text format, without those never updated. Blocks: call it in a thread.

        Raises:
            OSError: Envoy does not respond.
        """
        return self._blocking("GET", "/stats/prometheus?usedonly")

    async def announce_end(self) -> None:
        """Return 503 on /healthz, and ask clients to close their connections after their current requests."""
        await self._request("POST", "/healthcheck/fail")
        await self._request("POST", "/drain_listeners?graceful&skip_exit")

    async def close_listener(self) -> None:
        """Accept no new connections."""
        await self._request("POST", "/drain_listeners")

    async def _gauge(self, name: str) -> int:
        stats = json.loads(await self._request("GET", f"/stats?format=json&filter=^{name}$"))
        return int(stats["stats"][0]["value"])

    async def _request(self, method: str, target: str) -> bytes:
        return await asyncio.to_thread(self._blocking, method, target)

    def _blocking(self, method: str, target: str) -> bytes:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, target)
            return connection.getresponse().read()
        finally:
            connection.close()
