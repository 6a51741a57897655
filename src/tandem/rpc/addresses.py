"""The form of addresses in settings: host:port, or several of them separated by commas."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

PORT_MAX = 65_535


def parse_addresses(value: Any) -> Any:
    """A tuple of host:port from text like "a:1,b:2" or from a list of such.

    Raises:
        ValueError: says which address is malformed.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("must be host:port, or several separated by commas")
    return tuple(_checked(str(part).strip()) for part in parts)


def _checked(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= PORT_MAX:
        raise ValueError(f"{address!r} is not host:port")
    return address


Addresses = Annotated[tuple[str, ...], BeforeValidator(parse_addresses)]
