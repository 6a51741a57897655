"""Address formats in settings: host:port, srv://NAME for a DNS lookup, or several of them separated by commas.

Owns the syntax only; `tandem.discovery.srv_lookup` makes the lookups.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from tandem.domain.limits import PORT_MAX
from tandem.domain.network_address import HOST_NAME, bare_host

DNS_PORT = 53
SRV_PREFIX = "srv://"
FORMS = "host:port, or srv://NAME@HOST:PORT (a DNS name, and the DNS server to query)"
REGISTRY_TEXT = f"the registry: {FORMS}; several are separated by commas"
NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)


@dataclass(frozen=True, slots=True)
class SrvName:
    """A name whose SRV records contain host and port of each registry."""

    name: str
    server: str | None
    """Host of the DNS server to query; None: those of this machine."""
    port: int = DNS_PORT


def parse_addresses(value: Any) -> Any:
    """A tuple of addresses from a string like "a:1,b:2", or from a list of addresses.

    Raises:
        ValueError: says which address is malformed.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(f"must be {FORMS}; several are separated by commas")
    return tuple(_checked(str(part).strip()) for part in parts)


def parse_srv(address: str) -> SrvName | None:
    """The SRV name to look up; None for a plain host:port.

    Raises:
        ValueError: the address has neither format.
    """
    if not address.startswith(SRV_PREFIX):
        _host_and_port(address, address)
        return None
    name, at, server = address.removeprefix(SRV_PREFIX).partition("@")
    if not NAME.fullmatch(name):
        raise ValueError(f"{address!r}: {name!r} is not a DNS name")
    if not at:
        return SrvName(name, None)
    has_port = ":" in server.rpartition("]")[2]
    host, port = _host_and_port(server if has_port else f"{server}:{DNS_PORT}", address)
    return SrvName(name, bare_host(host), port)


def _checked(address: str) -> str:
    parse_srv(address)
    return address


def _host_and_port(text: str, address: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) <= PORT_MAX
    if not _is_host(host) or not is_port:
        raise ValueError(f"{address!r} is neither host:port nor srv://NAME@HOST:PORT")
    return host, int(port)


def _is_host(text: str) -> bool:
    """Whether it is a host name or an IP address; IPv6 must be in brackets."""
    if text.startswith("["):
        try:
            return text.endswith("]") and ipaddress.ip_address(text[1:-1]).version == 6
        except ValueError:
            return False
    return HOST_NAME.fullmatch(text) is not None


Addresses = Annotated[tuple[str, ...], BeforeValidator(parse_addresses)]
