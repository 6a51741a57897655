"""One HTTP/2 connection without TLS, either side, by hand: a library's frame objects cost more than what is measured.

Owns frames, windows and header blocks. Speaks only as much as gRPC on loopback needs: no priorities, no push, no
padding is ever sent. Knows nothing of messages; that is `grpc_wire.py`'s.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Iterable
from typing import cast

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 0x4, 0x5
HEAD = struct.Struct(">HBBBI")
SETTING = struct.Struct(">HI")
DEFAULT_WINDOW = 65_535
WINDOW_MAX = 2**31 - 1
REPLENISH_BYTES = 2**26
FRAME_BYTES_MAX = 16_384
CANCEL = 0x8

Headers = Iterable[tuple[str, str]]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame, whole."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def header_block(headers: Headers) -> bytes:
    """Headers spelt out, without table or compression, so that the block is the same in every place."""
    block = bytearray()
    for name, value in headers:
        block.append(0)
        for text in (name.encode(), value.encode()):
            block += _prefixed_length(len(text)) + text
    return bytes(block)


def _prefixed_length(size: int) -> bytes:
    """An integer with a prefix of seven bits (RFC 7541, 5.1)."""
    if size < 127:
        return bytes((size,))
    encoded, size = bytearray((127,)), size - 127
    while size >= 128:
        encoded.append(size & 127 | 128)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)


class Http2Protocol(asyncio.Protocol):
    """Frames in and out. What is sent waits for `flush`, which `data_received` calls at its end."""

    is_client = False

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received_s = 0.0
        """When the bytes that are being read had come."""
        self._buffer = b""
        self._out: list[bytes] = []
        self._decoder = Decoder()
        self._preface = b"" if self.is_client else PREFACE
        self._block: tuple[int, int, bytes] | None = None
        self._unreplenished = 0
        self._window = DEFAULT_WINDOW
        self._first_window = DEFAULT_WINDOW
        self._windows: dict[int, int] = {}
        self._held: dict[int, deque[tuple[bytes, bool]]] = {}
        """What the peer's windows have no room for: data, or a whole frame that comes behind it."""

    # What a subclass does with it.

    def on_headers(self, stream_id: int, headers: list[tuple[str, str]], ended: bool) -> None:
        """A header block has come."""

    def on_data(self, stream_id: int, payload: bytes, ended: bool) -> None:
        """Data has come."""

    def on_reset(self, stream_id: int) -> None:
        """The peer has ended a stream."""

    def on_lost(self) -> None:
        """The connection is gone."""

    # Sending.

    def open_stream(self, stream_id: int) -> None:
        """Give a stream its window."""
        self._windows[stream_id] = self._first_window

    def close_stream(self, stream_id: int) -> None:
        """Forget it, and what was still to be sent on it."""
        self._windows.pop(stream_id, None)
        self._held.pop(stream_id, None)

    def send_headers(self, stream_id: int, block: bytes, *, end: bool = False) -> None:
        """A header block; behind data that is held back, it waits as well."""
        whole = frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block)
        if stream_id in self._held:
            self._held[stream_id].append((whole, True))
        else:
            self._out.append(whole)

    def send_data(self, stream_id: int, payload: bytes, *, end: bool = False) -> None:
        """Data, as far as the peer's windows have room; the rest follows when they have."""
        size = len(payload)
        if size <= FRAME_BYTES_MAX and stream_id not in self._held:
            window = self._windows.get(stream_id, 0)
            if size <= window and size <= self._window:
                self._windows[stream_id] = window - size
                self._window -= size
                flags = END_STREAM if end else 0
                self._out.append(HEAD.pack(size >> 8, size & 0xFF, DATA, flags, stream_id) + payload)
                return
        if stream_id in self._windows:
            held = self._held.setdefault(stream_id, deque())
            pieces = [payload[at : at + FRAME_BYTES_MAX] for at in range(0, size, FRAME_BYTES_MAX)] or [b""]
            held.extend((piece, False) for piece in pieces)
            if end:
                held.append((frame(DATA, END_STREAM, stream_id), True))
            self._release(stream_id)

    def reset(self, stream_id: int, code: int = CANCEL) -> None:
        """End a stream at once."""
        self.close_stream(stream_id)
        self._out.append(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))

    def flush(self) -> None:
        """Hand everything that waits to the socket, in one piece."""
        if self._out and self.transport is not None:
            self.transport.write(b"".join(self._out))
            self._out.clear()

    def _release(self, stream_id: int) -> None:
        """Send of a stream what its windows allow now."""
        held = self._held[stream_id]
        while held:
            piece, is_frame = held[0]
            if is_frame:
                # It is the stream's last: trailers, or the end of a request.
                self._out.append(piece)
                self._windows.pop(stream_id, None)
            elif len(piece) <= min(self._window, self._windows[stream_id]):
                self._window -= len(piece)
                self._windows[stream_id] -= len(piece)
                self._out.append(frame(DATA, 0, stream_id, piece))
            else:
                return
            held.popleft()
        del self._held[stream_id]

    # Receiving.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello, with windows that never fill."""
        # uvloop has transports of its own classes.
        self.transport = cast("asyncio.Transport", transport)
        settings = SETTING.pack(INITIAL_WINDOW_SIZE, WINDOW_MAX)
        if self.is_client:
            self._out.append(PREFACE)
        self._out.append(frame(SETTINGS, 0, 0, settings))
        self._out.append(frame(WINDOW_UPDATE, 0, 0, (WINDOW_MAX - DEFAULT_WINDOW).to_bytes(4, "big")))
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can be sent any more."""
        self.transport = None
        self.on_lost()

    def data_received(self, data: bytes) -> None:
        """Take frames apart."""
        self.received_s = time.monotonic()
        if self._buffer:
            data = self._buffer + data
        at, end = 0, len(data)
        if self._preface:
            if end < len(PREFACE):
                self._buffer = data
                return
            if not data.startswith(PREFACE):
                self.abort()
                return
            at, self._preface = len(PREFACE), b""
        while end - at >= 9:
            high, low, kind, flags, stream_id = HEAD.unpack_from(data, at)
            begin = at + 9
            stop = begin + (high << 8 | low)
            if stop > end:
                break
            at = stop
            self._dispatch(kind, flags, stream_id & WINDOW_MAX, data[begin:stop])
        self._buffer = data[at:]
        self.flush()

    def abort(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def _dispatch(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == DATA:
            self._take_data(flags, stream_id, payload)
        elif kind == HEADERS:
            self._begin_block(flags, stream_id, payload)
        elif kind == CONTINUATION and self._block is not None:
            self._continue_block(flags, payload)
        elif kind == WINDOW_UPDATE:
            self._widen(stream_id, int.from_bytes(payload, "big") & WINDOW_MAX)
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind == PING and not flags & ACK:
            self._out.append(frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM:
            self.close_stream(stream_id)
            self.on_reset(stream_id)

    def _take_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._unreplenished += len(payload)
        if self._unreplenished >= REPLENISH_BYTES:
            self._out.append(frame(WINDOW_UPDATE, 0, 0, self._unreplenished.to_bytes(4, "big")))
            self._unreplenished = 0
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        self.on_data(stream_id, payload, bool(flags & END_STREAM))

    def _begin_block(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if flags & PRIORITY:
            payload = payload[5:]
        self._block = (stream_id, flags, payload)
        if flags & END_HEADERS:
            self._end_block()

    def _continue_block(self, flags: int, payload: bytes) -> None:
        assert self._block is not None
        stream_id, first_flags, block = self._block
        self._block = (stream_id, first_flags, block + payload)
        if flags & END_HEADERS:
            self._end_block()

    def _end_block(self) -> None:
        assert self._block is not None
        stream_id, flags, block = self._block
        self._block = None
        headers = [(str(name), str(value)) for name, value in self._decoder.decode(block)]
        self.on_headers(stream_id, headers, bool(flags & END_STREAM))

    def _widen(self, stream_id: int, more: int) -> None:
        if stream_id == 0:
            self._window += more
        elif stream_id in self._windows:
            self._windows[stream_id] += more
        waiting = list(self._held) if stream_id == 0 else [stream_id] if stream_id in self._held else []
        for one in waiting:
            self._release(one)

    def _take_settings(self, payload: bytes) -> None:
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                more, self._first_window = value - self._first_window, value
                for stream_id in self._windows:
                    self._windows[stream_id] += more
        for stream_id in list(self._held):
            self._release(stream_id)
        self._out.append(frame(SETTINGS, ACK, 0))
