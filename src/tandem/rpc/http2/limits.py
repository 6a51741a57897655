"""What a peer may ask of this server: constants, and budgets for what costs the peer less than it costs us.

Owns numbers only. Who is over one of them is refused by `connection`, `call` or `listener`.
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
REQUEST_SILENCE_S = 30.0
"""Most time between two pieces of one request. A message that never ends would hold its memory for ever."""
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
larger than `tandem.rpc.service_host.HEADERS_BYTES_MAX` ends its own call only."""
PEER_SETTINGS_MAX = 64
"""h2 keeps every setting of a peer, known or not."""
CLOSED_STREAMS_KEPT = 4_096
"""Of which a late frame is an error of its stream, not of the connection."""
QUEUED_REQUESTS_MAX = 10_000
"""Messages of one stream of requests that its handler has not read."""

CONTROL_BYTES_MAX = 2**20
"""Acknowledgements, headers and trailers a peer may leave unread; flow control does not hold them back."""

HELD_BYTES_MAX = 256 * 2**20
"""Unfinished requests of all connections. Room for four of the longest is always there; see `HeldBytes`."""
HELD_SHARE = 4
"""One connection may hold one such part of it."""


class Budget:
    """So many at once, and so many a second from then on."""

    __slots__ = ("_burst", "_left", "_per_s", "_seen_s")

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = float(burst)
        self._left = float(burst)
        self._per_s = per_s
        self._seen_s = 0.0

    def spend(self, now_s: float, earned: int = 0) -> bool:
        """Take one. False: there is none left. `earned` is given before."""
        if self._seen_s:
            earned_s = (now_s - self._seen_s) * self._per_s
            self._left = min(self._burst, self._left + earned_s + earned)
        self._seen_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def ping_budget() -> Budget:
    """Clients of gRPC measure the way with up to ten pings a second, and ask every 10 s whether we are there."""
    return Budget(200, 20)


def settings_budget() -> Budget:
    """Each is acknowledged, and may change the window of every stream."""
    return Budget(100, 1)


def idle_frame_budget() -> Budget:
    """Frames that carry nothing: window updates, priorities, empty DATA, unknown kinds.

    Each frame that is sent earns one, because a peer gives back what it has read.
    """
    return Budget(5_000, 1_000)


def reset_budget(streams_max: int) -> Budget:
    """Streams that were opened for nothing. An edge carries the cancellations of many clients on one connection.

    A client may give up all that it has open at once.
    """
    return Budget(max(STREAMS_MAX, streams_max), 100)


class HeldBytes:
    """Bytes of requests that have begun to arrive and are not whole yet, over all connections."""

    def __init__(self, request_bytes_max: int) -> None:
        self.bytes_max = max(HELD_BYTES_MAX, HELD_SHARE * request_bytes_max)
        self.share_bytes_max = self.bytes_max // HELD_SHARE
        self.bytes = 0
