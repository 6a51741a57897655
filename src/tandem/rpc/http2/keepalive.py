"""Whether the peer of a connection is still there: asks it after a while of silence, and gives it up without an answer.

Owns one timer for each connection. A client that vanished without a word would leave its calls running for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.rpc.http2 import limits

LAG_S = 0.5
"""After a bound has passed, what had arrived by then is read first: a loop that was busy must not take its own lag for
the peer's silence."""


class Keepalive:
    """Of one connection. `heard` is called for whatever comes."""

    __slots__ = ("_give_up", "_loop", "_ping", "_tick", "_timer", "heard_s")

    def __init__(self, ping: Callable[[], None], give_up: Callable[[str], None], tick: Callable[[], None]) -> None:
        """`tick` is called each time this looks at the clock, about every `limits.PING_AFTER_S`."""
        self._ping = ping
        self._give_up = give_up
        self._tick = tick
        self._loop = asyncio.get_running_loop()
        self.heard_s = self._loop.time()
        self._timer = self._loop.call_later(limits.HANDSHAKE_TIMEOUT_S, self._no_handshake)

    def begin(self) -> None:
        """The handshake is over."""
        self._timer.cancel()
        self._timer = self._loop.call_later(limits.PING_AFTER_S, self._look)

    def close(self) -> None:
        """The connection is gone."""
        self._timer.cancel()

    def _no_handshake(self) -> None:
        self._give_up(f"its handshake was not over within {limits.HANDSHAKE_TIMEOUT_S:g} s")

    def _look(self) -> None:
        self._tick()
        silence_s = self._loop.time() - self.heard_s
        if silence_s < limits.PING_AFTER_S:
            self._timer = self._loop.call_later(limits.PING_AFTER_S - silence_s, self._look)
            return
        self._ping()
        self._timer = self._loop.call_later(limits.PING_TIMEOUT_S, self._reevaluate, self.heard_s)

    def _reevaluate(self, heard_s: float, *, is_last: bool = False) -> None:
        if self.heard_s != heard_s:
            self._look()
        elif is_last:
            self._give_up(f"it was silent for {limits.PING_AFTER_S + limits.PING_TIMEOUT_S:g} s")
        else:
            self._timer = self._loop.call_later(LAG_S, self._last_look, heard_s)

    def _last_look(self, heard_s: float) -> None:
        self._reevaluate(heard_s, is_last=True)
