"""Hosts and addresses as text: `host`, without the brackets of IPv6, and `host:port`, with them.

Owns the two forms and the conversion. Settings and sockets have a host, messages and files an address. Resolves no
names and opens no sockets.
"""

from __future__ import annotations

import ipaddress
import re

HOST_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?", re.ASCII
)


def bare_host(text: str) -> str:
    """The host without the brackets of an IPv6 address."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def join_address(host: str, port: int) -> str:
    """`host:port`; an IPv6 address, with or without brackets, gets them."""
    host = bare_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
        ValueError: there is no number behind the last colon.
    """
    host, _, port = address.rpartition(":")
    return bare_host(host), int(port)


def is_any_host(host: str) -> bool:
    """Whether it stands for every address of a machine, in any spelling ("::", "[::]", "0:0::0")."""
    try:
        return ipaddress.ip_address(bare_host(host)).is_unspecified
    except ValueError:
        return host == ""


def checked_host(text: str) -> str:
    """A host name or IP address, without brackets and in its shortest spelling, as a setting has it.

    Raises:
        ValueError: says what it is instead.
    """
    host = bare_host(text)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None:
        if host != text and address.version == 4:
            raise ValueError("must not have an IPv4 address in brackets")
        return str(address)
    if host == text and HOST_NAME.fullmatch(text):
        return text
    name, colon, port = text.rpartition(":")
    if colon and port.isdigit() and (HOST_NAME.fullmatch(name) or name.startswith("[")):
        raise ValueError(f"must be a host without a port, not {text!r}: the port is a setting of its own")
    raise ValueError(f"must be an IP address or a host name, not {text!r}")
