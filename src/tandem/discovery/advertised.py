"""Whether other machines can call the address that a member advertises: mistakes that show on this machine.

Reads what the kernel publishes of network interfaces, and sends nothing. Each doubt is one sentence for the log, and
not an error: in one container, or on one machine, such an address may be right.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from tandem.discovery.addresses import parse_srv
from tandem.domain.network_address import split_address

log = logging.getLogger(__name__)

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
INTERFACES = Path("/sys/class/net")
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
SIOCGIFADDR = 0x8915
"""ioctl(2): the IPv4 address of an interface."""


async def log_doubts(address: str, registries: Sequence[str]) -> None:
    """Log each doubt, once."""
    for sentence in await asyncio.to_thread(doubts, address, registries):
        log.warning("%s", sentence)


def doubts(address: str, registries: Sequence[str]) -> list[str]:
    """Why the advertised `host:port` may be no address for other machines; blocks while names are resolved.

    `registries`: their addresses, in the format of the settings.
    """
    host = split_address(address)[0]
    own = _resolved(host)
    return [sentence for ip in own for sentence in _doubts_of(host, ip, registries)]


def _doubts_of(host: str, ip: IpAddress, registries: Sequence[str]) -> Iterator[str]:
    name = host if host == str(ip) else f"{host} ({ip})"
    if ip.is_loopback:
        elsewhere = next((registry for registry in registries if _is_elsewhere(registry)), None)
        if elsewhere is not None:
            yield (
                f"this process advertises {name}, which only this machine can call, to a registry on another machine "
                f"({elsewhere}): set advertise_host to an address of this machine"
            )
    elif ip.is_link_local:
        yield f"this process advertises {name}, a link-local address, which works on one link only: set advertise_host"
    bridge = _bridge_of(ip)
    if bridge is not None:
        yield (
            f"this process advertises {name}, the address of the bridge {bridge} inside this machine: other machines "
            "cannot call it, and may have a bridge with the same address: set advertise_host"
        )


def _resolved(host: str) -> list[IpAddress]:
    """IP addresses of a host, as the system resolves it; empty if it does not."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [ipaddress.ip_address(text) for text in dict.fromkeys(str(at[0]) for *_, at in found)]


def _is_elsewhere(registry: str) -> bool:
    """Whether a registry is certainly on another machine: its host is an IP address, and not one of this machine."""
    if parse_srv(registry) is not None:
        return False
    try:
        ip = ipaddress.ip_address(split_address(registry)[0])
    except ValueError:
        return False
    return not ip.is_loopback and not _is_own(ip)


def _is_own(ip: IpAddress) -> bool:
    """Whether it is an address of this machine: only such can be bound."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip), 0))
    except OSError:
        return False
    return True


def _bridge_of(ip: IpAddress) -> str | None:
    """The bridge that has the address, if it connects nothing but containers and virtual machines of this machine."""
    for _, name in socket.if_nameindex():
        bridge = INTERFACES / name
        if (bridge / "bridge").is_dir() and ip in _addresses_of(name):
            ports = (bridge / "brif").iterdir()
            # A network card has a device. With one among its ports, a bridge is how this machine is on the network.
            return None if any((INTERFACES / port.name / "device").exists() for port in ports) else name
    return None


def _addresses_of(interface: str) -> Iterator[IpAddress]:
    """The first IPv4 address of an interface, and all its IPv6 addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        # Refused for an interface without one.
        with contextlib.suppress(OSError):
            yield ipaddress.IPv4Address(fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)[20:24])
    try:
        lines = IPV6_ADDRESSES.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()
        if words[-1] == interface:
            yield ipaddress.IPv6Address(bytes.fromhex(words[0]))
