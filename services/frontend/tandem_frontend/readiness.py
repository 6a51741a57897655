"""The frontend's gRPC health: SERVING while it knows a worker of its model, until it drains.

A frontend without workers can only refuse, so edges and orchestrators must not send it requests. One that has lost the
registry keeps its last view, and stays ready with it. ProcessService is SERVING all the time: the process works.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.rpc.service_host import ServiceHost

log = logging.getLogger(__name__)


class Readiness:
    """Publishes whether requests should be sent to this frontend. A `tandem_frontend.fleet.WorkerFollower`."""

    def __init__(self, server: ServiceHost, model_name: str) -> None:
        """Publishes nothing yet."""
        self._server = server
        self._model_name = model_name
        self._knows_workers = False
        self._has_view = False
        self._is_leaving = False
        self._changed = asyncio.Event()

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new view. The state of the workers does not matter: a fleet that restarts is still known."""
        knows = any(worker.capabilities.model == self._model_name for worker in workers)
        if knows != self._knows_workers:
            self._knows_workers = knows
            self._changed.set()

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Loads do not matter either."""

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
            log.info("no worker of model %s is known: health is NOT_SERVING until one registers", self._model_name)
        await self._server.set_serving(self._knows_workers, works=True)
