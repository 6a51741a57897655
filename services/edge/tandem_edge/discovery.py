"""Who the frontends are, where the registry says it: follows the registry and tells Envoy after each change.

Owns the way from the registry's list to endpoints. Keeps the last known ones whatever happens to the registry; which of
them are healthy is found out by Envoy itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState
from tandem_edge.config import split
from tandem_edge.dns import Names
from tandem_edge.endpoints import Endpoint

log = logging.getLogger(__name__)

FIRST_TIMEOUT_S = 5.0
"""So long a start waits for a first frontend, which then has been checked before the edge says that it serves."""

Tell = Callable[[Sequence[Endpoint]], None]


class Discovery:
    """The registry's frontends as endpoints."""

    def __init__(self, watch: FrontendWatch, names: Names, refresh_s: float) -> None:
        """`refresh_s` is the time between two questions for a frontend's name."""
        self._watch = watch
        self._names = names
        self._refresh_s = refresh_s
        self._told: tuple[Endpoint, ...] = ()
        self._task: asyncio.Task[None] | None = None

    async def first(self) -> tuple[Endpoint, ...]:
        """Begin to follow; the endpoints as soon as there are any, or none when nobody told of one in time."""
        await self._watch.start()
        try:
            async with asyncio.timeout(FIRST_TIMEOUT_S):
                changed = self._watch.next_change
                while not (found := await self._endpoints()):
                    await self._wait(changed)
                    changed = self._watch.next_change
                self._told = found
        except TimeoutError:
            log.warning("no registry has told of a frontend yet: requests are answered with 503 until one does")
        return self._told

    def follow(self, tell: Tell) -> None:
        """Call `tell` after each change from now on, until `stop`."""
        self._task = asyncio.create_task(self._follow(tell), name="discovery")

    @property
    def following(self) -> asyncio.Task[None]:
        """Ends by `stop`, or by a defect."""
        assert self._task is not None, "following before follow()"
        return self._task

    async def stop(self) -> None:
        """Follow no more. May be called twice, and before `first`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._watch.close()

    async def _follow(self, tell: Tell) -> None:
        while True:
            changed = self._watch.next_change
            self._tell(tell, await self._endpoints())
            await self._wait(changed)

    async def _wait(self, changed: asyncio.Event) -> None:
        """Until the list changes, or it is time to look again at what the list does not say: a name, a file."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._refresh_s):
                await changed.wait()

    def _tell(self, tell: Tell, endpoints: tuple[Endpoint, ...]) -> None:
        if endpoints == self._told or not endpoints:
            return
        try:
            tell(endpoints)
        except OSError as problem:
            log.error("Envoy is not told of %d frontends: %s", len(endpoints), problem)
            return
        draining = sum(endpoint.is_draining for endpoint in endpoints)
        log.info("frontends: %d, of them draining: %d", len(endpoints), draining)
        self._told = endpoints

    async def _endpoints(self) -> tuple[Endpoint, ...]:
        frontends = self._watch.frontends()
        addresses = await self._names.addresses({split(frontend.address)[0] for frontend in frontends})
        return endpoints_of(frontends, addresses)


def endpoints_of(frontends: Iterable[Frontend], addresses: Mapping[str, Sequence[str]]) -> tuple[Endpoint, ...]:
    """Endpoints in order, each place once; one that several frontends claim serves when any of them does."""
    draining: dict[tuple[str, int], bool] = {}
    for frontend in frontends:
        host, port = split(frontend.address)
        for address in addresses[host]:
            drains = frontend.state is WorkerState.DRAINING
            draining[address, port] = draining.get((address, port), True) and drains
    return tuple(sorted(Endpoint(host, port, is_draining) for (host, port), is_draining in draining.items()))
