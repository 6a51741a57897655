"""Takes the bytes of a request stream apart into gRPC's messages, and unpacks those that are compressed.

Owns the bound on one message: it is refused by what its first five bytes say, before it has come. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import zlib

from tandem.errors import InvalidRequest, RequestTooLarge
from tandem.rpc.http2.framing import PREFIX

GZIP_BITS = 31
INLINE_BYTES_MAX = 1_024
"""What is compressed to more than this is unpacked in a thread, because it can be a thousand times as much."""


class MessageReader:
    """The messages of one stream, as its bytes come."""

    __slots__ = ("_buffer", "_bytes_max", "_flag_max")

    def __init__(self, bytes_max: int, *, may_be_compressed: bool) -> None:
        self._buffer = bytearray()
        self._bytes_max = bytes_max
        self._flag_max = 1 if may_be_compressed else 0

    @property
    def held_bytes(self) -> int:
        """Of a message that is not whole."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[tuple[bool, bytes]]:
        """The messages that are whole now: whether each is compressed, and its bytes.

        Raises:
            RequestTooLarge: one says that it will be longer than the bound.
            InvalidRequest: its first byte is neither 0 nor, where messages may be compressed, 1.
        """
        buffer, messages, begin = self._buffer, [], 0
        buffer += data
        while len(buffer) - begin >= PREFIX.size:
            flag, length = PREFIX.unpack_from(buffer, begin)
            self._check(flag, length)
            end = begin + PREFIX.size + length
            if len(buffer) < end:
                break
            messages.append((flag == 1, bytes(buffer[begin + PREFIX.size : end])))
            begin = end
        del buffer[:begin]
        return messages

    def _check(self, flag: int, length: int) -> None:
        if flag > self._flag_max:
            raise InvalidRequest("request", "is not framed as gRPC frames messages of this grpc-encoding")
        if length > self._bytes_max:
            raise too_large(f"{length} bytes", self._bytes_max)

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            InvalidRequest: in the middle of a message.
        """
        if self._buffer:
            raise InvalidRequest("request", "ended in the middle of a message")


async def unpacked(data: bytes, bytes_max: int) -> bytes:
    """`unpack`, in a thread where it may take long."""
    if len(data) <= INLINE_BYTES_MAX:
        return unpack(data, bytes_max)
    return await asyncio.to_thread(unpack, data, bytes_max)


def unpack(data: bytes, bytes_max: int) -> bytes:
    """A message that was compressed with gzip.

    Raises:
        RequestTooLarge: it would be longer than the bound; it is not unpacked any further.
        InvalidRequest: this is not gzip.
    """
    inflater = zlib.decompressobj(wbits=GZIP_BITS)
    try:
        message = inflater.decompress(data, bytes_max + 1)
    except zlib.error:
        raise InvalidRequest("request", "is not compressed with gzip") from None
    if len(message) > bytes_max:
        raise too_large(f"more than {bytes_max} bytes", bytes_max)
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("request", "is not compressed with gzip")
    return message


def too_large(size: str, bytes_max: int) -> RequestTooLarge:
    """The refusal of a message before it is read."""
    return RequestTooLarge("request", f"{size} are more than {bytes_max}", limit=bytes_max)
