"""Bytes that leave: header blocks, and frames around them and around gRPC's messages, in step with h2's state.

Owns what `h2.connection` is too slow for on the way out, and nothing on the way in: h2 parses every frame, keeps every
window and every state. What is written here by hand, and why that is correct:

- DATA: nine bytes before a message. h2's windows are read before and lowered after; DATA changes no state.
- Header blocks: literal fields that the peer's table does not remember, so a block means the same whatever was sent
  before. h2's encoder is asked first whether it has to announce another table size.
- GOAWAY: with h2's own, nothing could be sent any more; calls that run may end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from time import monotonic

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import StreamClosedError, StreamIDTooLowError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream, StreamInputs
from hpack.hpack import encode_integer
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame

from tandem.rpc.http2 import limits
from tandem.rpc.service_host import HEADERS_BYTES_MAX

DATA, HEADERS, GOAWAY = 0x0, 0x1, 0x7
END_STREAM, END_HEADERS = 0x1, 0x4
FRAME = struct.Struct(">HBBBI")
"""Length (in 16 and 8 bits), kind, flags, stream."""
PREFIX = struct.Struct(">BI")
"""Before each message of gRPC: whether it is compressed, and its length."""
FRAME_AND_PREFIX = struct.Struct(">HBBBIBI")
GOAWAY_BODY = struct.Struct(">II")
HEADERS_FRAME_BYTES_MAX = 2**14
"""What every peer takes in one frame."""

STATUS_200 = b"\x88"
"""`:status: 200` by its number in the static table."""


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that is spelt out, and that the peer is not to remember."""
    return b"".join((b"\x00", encode_integer(len(name), 7), name, encode_integer(len(value), 7), value))


def http_status(status: int) -> bytes:
    """`:status`, first of a header block."""
    return STATUS_200 if status == 200 else b"\x08\x03%d" % status


def header_block(status: int | None, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block of `:status`, unless there is none (trailers), and these fields.

    Raises:
        ValueError: it is longer than what every peer takes.
    """
    head = b"" if status is None else http_status(status)
    block = head + b"".join(literal(name, value) for name, value in fields)
    if len(block) > HEADERS_FRAME_BYTES_MAX:
        raise ValueError(f"{len(block)} bytes of metadata are more than {HEADERS_FRAME_BYTES_MAX}")
    return block


def goaway_frame(last_stream_id: int, error_code: ErrorCodes, why: bytes = b"") -> bytes:
    """GOAWAY; what it says counts for the peer, and h2 goes on."""
    body = GOAWAY_BODY.pack(last_stream_id, error_code) + why
    return FRAME.pack(len(body) >> 8, len(body) & 0xFF, GOAWAY, 0, 0) + body


class TurnBuffer(FrameBuffer):
    """h2's buffer of what has come, which gives the frames of one turn of the loop and counts them.

    The others stay in it: h2 takes them up when it is given more bytes, or none.
    """

    def __init__(self) -> None:
        super().__init__(server=True)
        self.frame_count = 0
        """Given so far, and what dear ones cost beside that."""
        self.is_late = False
        """The time of this turn is over."""
        self._until_s = 0.0

    def begin_turn(self) -> None:
        """Give frames for `limits.TURN_S`, one at least."""
        self.is_late = False
        self._until_s = monotonic() + limits.TURN_S

    @property
    def has_more(self) -> bool:
        """Whether frames may have been left for the next turn."""
        return self.is_late and len(self._data) >= FRAME.size

    def __next__(self) -> Frame:
        if self.is_late:
            raise StopIteration
        frame = super().__next__()
        self.frame_count += 1
        self.is_late = monotonic() > self._until_s
        return frame


class Http2State(H2Connection):
    """h2's connection as a server of many streams needs it."""

    MAX_CLOSED_STREAMS = limits.CLOSED_STREAMS_KEPT

    def __init__(self, streams_max: int) -> None:
        # What h2 finds wrong with a header ends the connection, and with it the calls of others behind the same edge:
        # `tandem.rpc.http2.metadata` looks at headers, and ends one stream.
        super().__init__(
            H2Configuration(client_side=False, validate_inbound_headers=False, normalize_inbound_headers=False)
        )
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: streams_max,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEADERS_BYTES_MAX,
            },
        )
        self.incoming_buffer: TurnBuffer = TurnBuffer()

    def begin(self) -> None:
        """Announce settings, and open the window of the connection."""
        self.initiate_connection()
        self.increment_flow_control_window(limits.CONNECTION_WINDOW_BYTES - self.inbound_flow_control_window)

    @property
    def open_inbound_streams(self) -> int:
        """None, as far as h2 is concerned.

        At its bound it would end the connection, where one stream is to be refused; a client may open more before it
        has heard of the bound. And it would look at every stream for each new one.
        """
        return 0

    def headers_frame(self, stream_id: int, block: bytes, *, ends: bool) -> bytes:
        """HEADERS with a block of `header_block`; h2's stream goes on to the state that follows."""
        state = self.streams[stream_id].state_machine
        state.process_input(StreamInputs.SEND_HEADERS)
        flags = END_HEADERS
        if ends:
            state.process_input(StreamInputs.SEND_END_STREAM)
            flags |= END_STREAM
        if self.encoder.header_table.resized:
            block = self.encoder.encode(()) + block
        return FRAME.pack(len(block) >> 8, len(block) & 0xFF, HEADERS, flags, stream_id) + block

    def forget(self, stream_id: int) -> None:
        """Keep of a stream that is closed no more than how it was."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._closed_streams[stream_id] = stream.closed_by

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        """Unpack a block as far as its length allows.

        Those of a stream that is closed are unpacked as well, and h2 makes no event of them.
        """
        unpacked_bytes_max = HEADERS_BYTES_MAX + len(frame.data)
        self.decoder.max_header_list_size = min(unpacked_bytes_max, limits.HEADER_BLOCK_BYTES_MAX)
        try:
            return super()._receive_headers_frame(frame)
        except (StreamClosedError, StreamIDTooLowError):
            self.incoming_buffer.frame_count += len(frame.data) // limits.HEADER_COST_BYTES
            raise

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """A client that opens no more streams still waits for the answers to those it has opened.

        h2 would not go on, and would drop what it was about to send.
        """
        state, waiting = self.state_machine.state, self.data_to_send()
        found = super()._receive_goaway_frame(frame)
        self.state_machine.state = state
        self._data_to_send += waiting
        return found

    def open_stream(self, stream_id: int) -> H2Stream | None:
        """A stream on which something may still be sent. One event may close what an event before it had opened."""
        stream = self.streams.get(stream_id)
        return None if stream is None or stream.closed else stream

    @property
    def is_overfull(self) -> bool:
        """Whether what has not come to its end is longer than any frame or any header block may be.

        h2 waits for the whole of a frame before it looks at its length, and counts the frames of a header block only.
        """
        buffer = self.incoming_buffer
        if len(buffer._data) >= FRAME.size and int.from_bytes(buffer._data[:3], "big") > self.max_inbound_frame_size:
            return True
        return sum(len(frame.data) for frame in buffer._headers_buffer) > limits.HEADER_BLOCK_BYTES_MAX
