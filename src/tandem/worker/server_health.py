"""The worker's gRPC health: what the engine's health and the registration mean for health checkers.

Owns the rule. `engine_health` checks the engine, `app` says when the worker is registered and when it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tandem.rpc.service_host import ServiceHost


class ServerHealth:
    """The health that the gRPC server reports: the engine's, from the first registration until the worker leaves.

    SERVING means that frontends can route to the worker. So a rolling restart waits, and keeps the other workers, while
    no registry responds. ProcessService is SERVING while the engine works, registered or not. A registry that is lost
    later changes nothing: the worker stays in the frontends' last view.
    """

    def __init__(self, server: ServiceHost, idle_services: Callable[[], Collection[str]] = tuple) -> None:
        """`idle_services`: names of the services that no caller may use now, those of other roles."""
        self._server = server
        self._idle_services = idle_services
        self._works = False
        self._is_registered = False
        self._is_leaving = False

    async def report(self, trouble: str | None) -> None:
        """Take the engine's health; None: no trouble."""
        self._works = trouble is None
        await self._publish()

    async def note_registered(self) -> None:
        """A registry has confirmed the first registration."""
        self._is_registered = True
        await self._publish()

    async def leave(self) -> None:
        """Report NOT_SERVING from here on, even when the engine is healthy."""
        self._is_leaving = True
        await self._publish()

    async def rejoin(self) -> None:
        """End what `leave` began: the worker has its new role and is registered under its new epoch."""
        self._is_leaving = False
        await self._publish()

    async def _publish(self) -> None:
        works = self._works and not self._is_leaving
        await self._server.set_serving(works and self._is_registered, works=works, idle=self._idle_services())
