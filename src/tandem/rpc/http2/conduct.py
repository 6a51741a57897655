"""What one peer has sent, against what it may send: its budgets.

Owns the counts. What happens to a peer that is over one of them is `connection`'s.

Every frame that comes costs one. Those that mean something earn it back, and frames and bytes that a peer answers or
carries earn more; what is left are frames without an effect, of whatever kind h2 swallows without an event.
"""

from __future__ import annotations

from tandem.errors import Overloaded
from tandem.rpc.http2 import limits

REQUEST_WORTH = 2
"""Its own frame, and a reset or a window update that comes after its end."""
MESSAGE_WORTH = 2
"""A message that is sent is given back to the window of its stream and of the connection, some time later."""


class Conduct:
    """Of one connection's peer."""

    __slots__ = (
        "_cost",
        "_frames",
        "_late_streams",
        "_messages_sent",
        "_owed",
        "_pieces",
        "_pings",
        "_resets",
        "_settings",
        "bytes",
        "worth",
    )

    def __init__(self, streams_max: int) -> None:
        self._resets = limits.reset_budget(streams_max)
        self._late_streams = limits.reset_budget(streams_max)
        self._pings = limits.ping_budget()
        self._settings = limits.settings_budget()
        self._frames = limits.idle_frame_budget()
        self._pieces = limits.small_piece_budget()
        self._cost = self._messages_sent = self._owed = 0
        self.bytes = 0
        """Received so far."""
        self.worth = 0
        """What the frames received so far have earned."""

    def frames(self, now_s: float, received: int, messages_sent: int) -> bool:
        """Take note of the frames that have come and the messages that have left so far. False: too many are empty."""
        cost = received - self.worth - self.bytes // limits.FRAME_WORTH_BYTES
        owed = self._owed + MESSAGE_WORTH * (messages_sent - self._messages_sent)
        more, paid = cost - self._cost, min(max(cost - self._cost, 0), owed)
        self._owed = min(owed - paid, limits.OWED_FRAMES_MAX)
        self._cost, self._messages_sent = cost, messages_sent
        return self._frames.spend(now_s, more - paid)

    def ping(self, now_s: float) -> bool:
        """A ping that is answered. False: too many."""
        self.worth += 1
        return self._pings.spend(now_s)

    def settings(self, now_s: float) -> bool:
        """Settings that are acknowledged. False: too many."""
        self.worth += 1
        return self._settings.spend(now_s)

    def reset(self, now_s: float, count: int = 1) -> bool:
        """A stream that was opened for nothing, as dear as so many. False: too many."""
        return self._resets.spend(now_s, count)

    def late_stream(self, now_s: float) -> bool:
        """A stream that was opened after GOAWAY. False: too many."""
        return self._late_streams.spend(now_s)

    def piece(self, now_s: float, messages: int) -> None:
        """A short piece of a request, which completes so many messages.

        Raises:
            Overloaded: there are too many that complete none.
        """
        if not self._pieces.spend(now_s, -messages if messages else 1):
            raise Overloaded("the request comes in too many small pieces: send larger DATA frames")
