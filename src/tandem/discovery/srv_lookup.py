"""Resolves a name to addresses by its DNS SRV records, over TCP.

Over TCP, because Consul returns at most three records over UDP, without marking the response as truncated. Caches
nothing: `tandem.discovery.address_book` handles failed lookups.
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
from tandem.domain.network_address import join_address
from tandem.errors import ServiceError

LOOKUP_TIMEOUT_S = 1.0
"""Short, so that a slow DNS server does not delay the keep-alive to another registry until the lease expires."""


async def resolve_srv(srv: SrvName, rng: random.Random, timeout_s: float = LOOKUP_TIMEOUT_S) -> tuple[str, ...]:
    """Addresses (host:port) of a name: by priority, in random order within one priority.

    Raises:
        ServiceError: the lookup timed out or failed, or its targets have no addresses.
    """
    try:
        async with asyncio.timeout(timeout_s):
            resolver = await _resolver(srv, timeout_s)
            answer = await resolver.resolve(srv.name, "SRV", tcp=True)
            records = sorted(answer, key=lambda record: (record.priority, rng.random()))
            found = [
                join_address(host, record.port)
                for record in records
                for host in await _hosts(resolver, record.target, answer.response)
            ]
    except TimeoutError:
        raise ServiceError(f"DNS lookup of {srv.name} timed out after {timeout_s:g} s") from None
    except (dns.exception.DNSException, OSError) as problem:
        raise ServiceError(f"DNS lookup of {srv.name} failed: {problem}") from None
    if not found:
        raise ServiceError(f"the SRV targets of {srv.name} have no addresses")
    return tuple(dict.fromkeys(found))


async def _resolver(srv: SrvName, timeout_s: float) -> dns.asyncresolver.Resolver:
    resolver = dns.asyncresolver.Resolver(configure=srv.server is None)
    resolver.lifetime = timeout_s
    if srv.server is not None:
        servers = await _server_ips(srv.server, srv.port)
        resolver.nameservers = [dns.nameserver.Do53Nameserver(server, srv.port) for server in servers]
    return resolver


async def _server_ips(host: str, port: int) -> list[str]:
    """IP addresses of the DNS server; a host name is resolved by the system's resolver."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        known = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in known]


async def _hosts(
    resolver: dns.asyncresolver.Resolver, target: dns.name.Name, response: dns.message.Message
) -> Iterable[str]:
    """IP addresses of a target: from the additional section of the response, else from further lookups."""
    kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
    additional = [
        record.address
        for records in response.additional
        if records.name == target and records.rdtype in kinds
        for record in records
    ]
    if additional:
        return additional
    for kind in kinds:
        try:
            return [record.address for record in await resolver.resolve(target, kind, tcp=True)]
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            continue
    return []
