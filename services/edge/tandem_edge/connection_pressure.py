"""Reports to Envoy what part of its connections is in use, so that it closes idle ones sooner the fewer are left.

Envoy refuses connections beyond `connections_max` by itself, but reports their number to none of its own timers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

POLL_S = 0.5


class ConnectionPressure:
    """Follows the number of open connections."""

    def __init__(
        self, count: Callable[[], Awaitable[int]], publish: Callable[[float], None], connections_max: int
    ) -> None:
        """`count` returns the open connections; `publish` gets the part of `connections_max` that they are, 0 to 1.

        Both may raise OSError: the next look tries again.
        """
        self._count = count
        self._publish = publish
        self._connections_max = connections_max
        self._published: float | None = None

    async def follow(self) -> None:
        """Publish each change, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.look()
            except OSError as problem:
                log.warning("could not pass on how many connections are open, retrying: %s", problem)

    async def look(self) -> None:
        """Publish the present part if it has changed by a hundredth."""
        part = round(min(1.0, await self._count() / self._connections_max), 2)
        if part != self._published:
            self._publish(part)
            self._published = part
