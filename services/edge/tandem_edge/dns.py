"""Resolves the host names that frontends advertise: Envoy's endpoint discovery (EDS) accepts only IP addresses.

Owns the lookups by the system's resolver, and the cache of last known addresses for failed ones. Knows nothing of
frontends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection

from tandem_edge.config import is_ip

log = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[tuple[str, ...]]]


async def resolve_by_system(host: str) -> tuple[str, ...]:
    """Sorted IPv4 addresses of a name, or its IPv6 addresses if it has no IPv4 ones.

    Raises:
        OSError: the name is unknown, or DNS does not respond.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    by_family = {family: {str(at[0]) for kind, *_, at in found if kind == family} for family, *_ in found}
    return tuple(sorted(by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or ()))


class Names:
    """Resolves hosts to addresses, and caches the last result of each."""

    def __init__(self, resolve: Resolve = resolve_by_system) -> None:
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = {}
        self._failing: set[str] = set()

    async def addresses(self, hosts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Addresses of each host; none for one that has never been resolved. Drops all other hosts from the cache."""
        found = await asyncio.gather(*(self._addresses(host) for host in hosts))
        self._known = dict(zip(hosts, found, strict=True))
        self._failing &= set(hosts)
        return self._known

    async def _addresses(self, host: str) -> tuple[str, ...]:
        if is_ip(host):
            return (host,)
        try:
            found = await self._resolve(host)
        except OSError as problem:
            known = self._known.get(host, ())
            if host not in self._failing:
                log.warning(
                    "could not resolve frontend host %s: %s; keeping %d known addresses", host, problem, len(known)
                )
                self._failing.add(host)
            return known
        self._failing.discard(host)
        return found
