"""The frontend's gRPC health: SERVING while it knows a worker of a model that it serves, until it drains.

A frontend without workers can only refuse, so edges and orchestrators must not send it requests. One that has lost the
registry keeps its last view, and stays ready with it. ProcessService is SERVING all the time: the process works.
"""

from __future__ import annotations

import asyncio
import logging

from tandem.rpc.service_host import ServiceHost

log = logging.getLogger(__name__)


class Readiness:
    """Publishes whether requests should be sent to this frontend."""

    def __init__(self, server: ServiceHost) -> None:
        """Publishes nothing yet."""
        self._server = server
        self._knows_workers = False
        self._has_view = False
        self._is_leaving = False
        self._changed = asyncio.Event()

    def note(self, knows_workers: bool) -> None:
        """Whether a model that is served has workers. Their state does not matter: a fleet that restarts is known."""
        if knows_workers != self._knows_workers:
            self._knows_workers = knows_workers
            self._changed.set()

    async def open(self) -> None:
        """Publish the health for the first time: a registry has sent its view."""
        self._has_view = True
        await self._publish()

    async def keep(self) -> None:
        """Publish each change until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._has_view:
                await self._publish()

    async def leave(self) -> None:
        """Report NOT_SERVING from here on."""
        self._is_leaving = True
        await self._server.set_serving(False)

    async def _publish(self) -> None:
        if self._is_leaving:
            return
        if not self._knows_workers:
            log.info("no worker of a model that is served is known: health is NOT_SERVING until one registers")
        await self._server.set_serving(self._knows_workers, works=True)
