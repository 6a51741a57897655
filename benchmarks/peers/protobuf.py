"""The little of protobuf's wire format that is written by hand, where a message is sent for every token."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    if number < 128:
        return bytes((number,))
    encoded = bytearray()
    while number >= 128:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
