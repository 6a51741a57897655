"""Addresses of the hosts that frontends name themselves by: Envoy's discovery of endpoints takes no names.

Owns asking the system, and keeping the last answer where it has none. Knows nothing of frontends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection

from tandem_edge.config import is_ip

log = logging.getLogger(__name__)

Ask = Callable[[str], Awaitable[tuple[str, ...]]]


async def ask_system(host: str) -> tuple[str, ...]:
    """IPv4 addresses of a name, or its IPv6 ones where it has no other, in order.

    Raises:
        OSError: nobody knows it, or nobody answers.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    by_family = {family: {str(place[0]) for kind, *_, place in found if kind == family} for family, *_ in found}
    return tuple(sorted(by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or ()))


class Names:
    """Hosts to addresses, with the last answer for each."""

    def __init__(self, ask: Ask = ask_system) -> None:
        self._ask = ask
        self._known: dict[str, tuple[str, ...]] = {}
        self._failing: set[str] = set()

    async def addresses(self, hosts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Addresses of each host; none for one that could not be looked up yet. Forgets all others."""
        found = await asyncio.gather(*(self._addresses(host) for host in hosts))
        self._known = dict(zip(hosts, found, strict=True))
        self._failing &= set(hosts)
        return self._known

    async def _addresses(self, host: str) -> tuple[str, ...]:
        if is_ip(host):
            return (host,)
        try:
            found = await self._ask(host)
        except OSError as problem:
            known = self._known.get(host, ())
            if host not in self._failing:
                log.warning("the name %s of a frontend: %s; keeping %d known addresses", host, problem, len(known))
                self._failing.add(host)
            return known
        self._failing.discard(host)
        return found
