"""Resolves the host names that frontends advertise: Envoy's endpoint discovery (EDS) accepts only IP addresses.

Owns the lookups by the system's resolver, and the cache of last known addresses for failed ones. Knows nothing of
frontends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence

from tandem_edge.config import is_ip

log = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[tuple[str, ...]]]
Connects = Callable[[str, int], Awaitable[bool]]
CONNECT_TIMEOUT_S = 1.0


async def resolve_by_system(host: str) -> tuple[str, ...]:
    """Sorted IPv4 addresses of a name, and behind them its IPv6 addresses.

    Raises:
        OSError: the name is unknown, or DNS does not respond.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(sorted({str(at[0]) for *_, at in found}, key=lambda address: (":" in address, address)))


async def connects(host: str, port: int) -> bool:
    """Whether a TCP connection can be opened within CONNECT_TIMEOUT_S."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


class Families:
    """Which addresses to use of a name that has IPv4 and IPv6 ones, of which a process may listen on one only.

    Envoy could have both in one endpoint, but checks the health of its first address only.
    """

    def __init__(self, connects: Connects = connects) -> None:
        self._connects = connects
        self._chosen: dict[tuple[tuple[str, ...], int], tuple[str, ...]] = {}

    async def reachable(self, addresses: Sequence[str], port: int) -> tuple[str, ...]:
        """The IPv4 addresses if one accepts a connection, else the IPv6 ones if one does, else all of the IPv4 ones.

        An answer is kept; without one the addresses are tried again at the next call.
        """
        key = (tuple(addresses), port)
        families = [tuple(a for a in addresses if (":" in a) is is_ipv6) for is_ipv6 in (False, True)]
        if not all(families):
            return tuple(addresses)
        if key not in self._chosen:
            for family in families:
                if any(await asyncio.gather(*(self._connects(address, port) for address in family))):
                    self._chosen[key] = family
                    break
        return self._chosen.get(key, families[0])

    def keep_only(self, places: Collection[tuple[tuple[str, ...], int]]) -> None:
        """Forget every answer for other places."""
        self._chosen = {key: family for key, family in self._chosen.items() if key in places}


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
