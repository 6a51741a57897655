"""Discovers frontends from the registry: watches its list and publishes endpoints to Envoy after each change.

Owns the mapping from the registry's list to endpoints; every frontend serves every model. Keeps the last known
endpoints while the registry is unreachable or its list is empty: Envoy's own health checks find out which of them are
healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.domain.network_address import split_address
from tandem.domain.worker import WorkerState
from tandem_edge.dns import Families, Names
from tandem_edge.endpoints import Endpoint

log = logging.getLogger(__name__)

FIRST_TIMEOUT_S = 5.0
"""Longest wait of the start for a first frontend, so that Envoy has checked its health before the edge is ready."""

Publish = Callable[[Sequence[Endpoint]], None]


class Discovery:
    """The registry's frontends as endpoints."""

    def __init__(self, watch: FrontendWatch, names: Names, refresh_s: float) -> None:
        """`refresh_s` is the time between two DNS lookups of a frontend's name."""
        self._watch = watch
        self._names = names
        self._families = Families()
        self._refresh_s = refresh_s
        self._published: tuple[Endpoint, ...] = ()
        self._task: asyncio.Task[None] | None = None

    async def first(self) -> tuple[Endpoint, ...]:
        """Start the watch; returns the endpoints once there are any, or none after FIRST_TIMEOUT_S."""
        await self._watch.start()
        try:
            async with asyncio.timeout(FIRST_TIMEOUT_S):
                changed = self._watch.next_change
                while not (found := await self._endpoints()):
                    await self._wait(changed)
                    changed = self._watch.next_change
                self._published = found
        except TimeoutError:
            log.warning("no frontends discovered yet; answering 503 until the registry lists one")
        return self._published

    def follow(self, publish: Publish) -> asyncio.Task[None]:
        """Call `publish` after each change from now on. The task ends by `stop`, or by an unexpected exception."""
        self._task = asyncio.create_task(self._follow(publish), name="discovery")
        return self._task

    async def stop(self) -> None:
        """Stop the watch. May be called twice, and before `first`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._watch.close()

    async def _follow(self, publish: Publish) -> None:
        while True:
            changed = self._watch.next_change
            self._publish(publish, await self._endpoints())
            await self._wait(changed)

    async def _wait(self, changed: asyncio.Event) -> None:
        """Until the list changes, or names must be resolved again and a failed write retried."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._refresh_s):
                await changed.wait()

    def _publish(self, publish: Publish, endpoints: tuple[Endpoint, ...]) -> None:
        if endpoints == self._published or not endpoints:
            return
        try:
            publish(endpoints)
        except OSError as problem:
            log.error("could not write Envoy's endpoint file (%d frontends), retrying: %s", len(endpoints), problem)
            return
        draining = sum(endpoint.is_draining for endpoint in endpoints)
        log.info("published %d frontends to Envoy, %d of them draining", len(endpoints), draining)
        self._published = endpoints

    async def _endpoints(self) -> tuple[Endpoint, ...]:
        frontends = self._watch.frontends()
        places = {split_address(frontend.address) for frontend in frontends}
        known = await self._names.addresses({host for host, _ in places})
        self._families.keep_only({(tuple(known[host]), port) for host, port in places})
        chosen = [self._families.reachable(known[host], port) for host, port in places]
        return endpoints_of(frontends, dict(zip(places, await asyncio.gather(*chosen), strict=True)))


def endpoints_of(
    frontends: Iterable[Frontend], addresses: Mapping[tuple[str, int], Sequence[str]]
) -> tuple[Endpoint, ...]:
    """Sorted endpoints without duplicates; an address of several frontends is draining only if all of them are."""
    draining: dict[tuple[str, int], bool] = {}
    for frontend in frontends:
        host, port = split_address(frontend.address)
        for address in addresses[host, port]:
            drains = frontend.state is WorkerState.DRAINING
            draining[address, port] = draining.get((address, port), True) and drains
    return tuple(sorted(Endpoint(host, port, is_draining) for (host, port), is_draining in draining.items()))
