"""Names to addresses: asks DNS for the SRV records of a name, over TCP.

Over TCP, because Consul puts three records at most into an answer over UDP and does not say that it cut it. Remembers
nothing; what becomes of an answer that does not come is `tandem.discovery.address_book`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections.abc import Iterable

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver

from tandem.discovery.addresses import SrvName
from tandem.errors import ServiceError

ANSWER_TIMEOUT_S = 1.0
"""A sign of life to another registry must not be late because DNS is."""


async def resolve_srv(srv: SrvName, rng: random.Random, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[str, ...]:
    """Addresses (host:port) behind a name: by priority, those of equal priority in any order.

    Raises:
        ServiceError: DNS did not answer, knows no such name, or has no address for it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            resolver = await _resolver(srv, timeout_s)
            answer = await resolver.resolve(srv.name, "SRV", tcp=True)
            records = sorted(answer, key=lambda record: (record.priority, rng.random()))
            found = [
                _joined(host, record.port)
                for record in records
                for host in await _hosts(resolver, record.target, answer.response)
            ]
    except TimeoutError:
        raise ServiceError(f"DNS did not answer for {srv.name} within {timeout_s:g} s") from None
    except (dns.exception.DNSException, OSError) as problem:
        raise ServiceError(f"DNS has no answer for {srv.name}: {problem}") from None
    if not found:
        raise ServiceError(f"DNS has no address for the targets of {srv.name}")
    return tuple(dict.fromkeys(found))


async def _resolver(srv: SrvName, timeout_s: float) -> dns.asyncresolver.Resolver:
    resolver = dns.asyncresolver.Resolver(configure=srv.server is None)
    resolver.lifetime = timeout_s
    if srv.server is not None:
        servers = await _server_ips(srv.server, srv.port)
        resolver.nameservers = [dns.nameserver.Do53Nameserver(server, srv.port) for server in servers]
    return resolver


async def _server_ips(host: str, port: int) -> list[str]:
    """The DNS server's own addresses: it may be given by name, which the machine's other means have to know."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        known = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in known]


async def _hosts(
    resolver: dns.asyncresolver.Resolver, target: dns.name.Name, response: dns.message.Message
) -> Iterable[str]:
    """IP addresses of a target: those that came along with the answer, else those that DNS says when asked."""
    kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
    along = [
        record.address
        for records in response.additional
        if records.name == target and records.rdtype in kinds
        for record in records
    ]
    if along:
        return along
    for kind in kinds:
        try:
            return [record.address for record in await resolver.resolve(target, kind, tcp=True)]
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            continue
    return []


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
