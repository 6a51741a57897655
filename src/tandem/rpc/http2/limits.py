"""What a peer may ask of this server: constants, and budgets for what costs the peer less than it costs us.

Owns numbers only. `connection`, `call` and `listener` refuse what exceeds them.
"""

from __future__ import annotations

STREAMS_MAX = 1_000
"""Calls open at a time on one connection. A client with more opens another connection, or waits."""
CONNECTIONS_MAX = 10_000

HANDSHAKE_TIMEOUT_S = 10.0
"""From the accepted connection to the peer's first SETTINGS, TLS included."""
PING_AFTER_S = 10.0
"""So long without a byte, and the peer is asked whether it is there."""
PING_TIMEOUT_S = 5.0
PROGRESS_BYTES = 16 * 2**10
PROGRESS_TIMEOUT_S = 30.0
"""Of a request that is not whole, and of a finished response that is not read, so many bytes must pass in this time: 4
kbit/s. A message that never ends would hold its memory for ever, and so would one with a byte now and then."""
MESSAGE_TIMEOUT_S = 300.0
"""Most time for the whole of it. The longest message takes 0.5 Mbit/s."""
GOAWAY_WAIT_S = 1.0
"""Most time for a peer to answer the first GOAWAY. Streams that it opens until then are served."""
GOAWAY_SETTLE_S = 0.1
"""From its answer to the second GOAWAY, which refuses what comes later."""
TURN_S = 0.001
"""Frames of one connection are worked through for so long in one turn of the loop, then others have theirs."""
CLOSE_TIMEOUT_S = 3.0
"""Most time for the last bytes of a connection that is closed to leave."""

STREAM_WINDOW_BYTES = 2**20
CONNECTION_WINDOW_BYTES = 4 * 2**20
ACK_BYTES = 64 * 2**10
"""Received bytes are given back to the connection's window in pieces of about this size."""

STREAM_UNSENT_BYTES_MAX = 64 * 2**10
"""A stream with more than this unsent is not writable."""
SOCKET_BUFFER_BYTES = 64 * 2**10
TURN_BYTES_MAX = 256 * 2**10
"""What one turn of the loop may collect for a connection before it is handed to the socket early."""
FRAME_BYTES_MAX = 64 * 2**10
"""Longest DATA frame that is sent to a peer that would take longer ones; other streams wait for it to pass."""

HEADER_BLOCK_BYTES_MAX = 256 * 2**10
"""Of one header block, packed or unpacked. More ends the connection, because its compression state is lost; what is
larger than `tandem.rpc.service_host.HEADERS_BYTES_MAX` (64 KiB) ends its own call only, if it came as long as that. A
field of one byte counts up to 60 and takes 2.5 us to unpack: a block may unpack to 64 KiB more than it is, 3 ms."""
HEADER_COST_BYTES = 64
"""A header block that h2 unpacks for a stream that is closed costs a frame for each so many bytes."""
LARGE_HEADERS_COST = 8
"""Headers that were unpacked and are too large cost so many streams that come to nothing."""
PEER_SETTINGS_MAX = 64
"""h2 keeps every setting of a peer, known or not."""
CLOSED_STREAMS_KEPT = 4_096
"""Of which a late frame is an error of its stream, not of the connection."""
QUEUED_REQUESTS_MAX = 10_000
"""Messages of one stream of requests that its handler has not read."""

CONTROL_BYTES_MAX = 2**20
"""Acknowledgements, headers and trailers a peer may leave unread; flow control does not hold them back."""

HELD_BYTES_MAX = 256 * 2**20
"""Unfinished requests of all connections. Four of the longest always fit."""
HELD_SHARE = 4
"""One connection may hold one such part of it."""
UNSENT_BYTES_MAX = 256 * 2**20
"""Messages of all connections that their peers do not read. As much as 4,096 streams that wait at
`STREAM_UNSENT_BYTES_MAX`; whole answers have no bound of their own but the length of a message."""


class Budget:
    """So many at once, and so many a second from then on."""

    __slots__ = ("_burst", "_left", "_per_s", "_seen_s")

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = float(burst)
        self._left = float(burst)
        self._per_s = per_s
        self._seen_s = 0.0

    def spend(self, now_s: float, count: int = 1) -> bool:
        """Take so many; a negative count gives. False: there are not so many left."""
        left = self._left
        if self._seen_s:
            left = min(self._burst, left + (now_s - self._seen_s) * self._per_s)
        self._seen_s = now_s
        if count > 0 and count > left:
            self._left = left
            return False
        self._left = min(self._burst, left - count)
        return True


def ping_budget() -> Budget:
    """Clients of gRPC measure the way with up to ten pings a second, and ask every 10 s whether we are there."""
    return Budget(200, 20)


def settings_budget() -> Budget:
    """Each is acknowledged, and may change the window of every stream."""
    return Budget(100, 1)


FRAME_WORTH_BYTES = 2**10
"""Bytes that earn a frame: a peer may send as many frames as it likes if they are long."""
OWED_FRAMES_MAX = 50_000
"""Window updates for messages that were sent and that a peer may have put off: half a second of work."""
PIECE_BYTES_MIN = 2**10
"""A shorter piece in the middle of a request counts as a small one."""


def idle_frame_budget() -> Budget:
    """Frames that carry nothing: window updates, priorities, empty DATA, unknown kinds, all on streams that are closed.

    See `tandem.rpc.http2.conduct` for what earns them.
    """
    return Budget(5_000, 1_000)


def small_piece_budget() -> Budget:
    """Short DATA frames in the middle of a message. Each message that is whole earns one.

    An edge passes on what its clients send, so beyond it the call is refused that has sent the piece.
    """
    return Budget(5_000, 1_000)


def reset_budget(streams_max: int) -> Budget:
    """Streams that were opened for nothing. An edge carries the cancellations of many clients on one connection.

    A client may give up all that it has open at once.
    """
    return Budget(max(STREAMS_MAX, streams_max), 100)


def held_bytes_max(request_bytes_max: int) -> int:
    """Of requests that have begun to arrive and are not whole yet, over all connections."""
    return max(HELD_BYTES_MAX, HELD_SHARE * request_bytes_max)
