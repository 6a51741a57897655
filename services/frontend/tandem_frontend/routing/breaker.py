"""The breaker of one start of a worker: whether requests may go there now, and when one may try again.

Pure: times are given. Counts the strikes of its own worker; whether a failure is one, which only a look at its peers
can tell, is `breakers`'.
"""

from __future__ import annotations

import random
from enum import Enum

from tandem.rpc.backoff import Backoff

OPEN_FIRST_S, OPEN_MAX_S = 1.0, 10.0
"""How long it stays open at first, and at most after probes that failed; each drawn from its upper half."""
PROBE_S = 3.0
"""After so long without a verdict a probe makes room for the next one. Longer than a silent leg is waited for."""
FORGIVEN_S = 30.0
"""Closed for so long, the next opening is a first one again."""
RELIEF_S = 1.0
"""Of all that it does well within so long, one strike is taken back: it may fail only a part of its requests."""


class BreakerState(Enum):
    """Whether requests go to a worker."""

    CLOSED = "closed"
    """They do."""
    OPEN = "open"
    """They do not; when its time is over, the next one is a probe."""
    HALF_OPEN = "half-open"
    """A probe is on its way, and nothing else."""


class Breaker:
    """One worker's."""

    def __init__(self, rng: random.Random) -> None:
        self.state = BreakerState.CLOSED
        self.strikes = 0
        self.strike_s = 0.0
        """When the last one was."""
        self.success_s = float("-inf")
        """When it last did its part of a request."""
        self.until_s = float("-inf")
        """When the next probe may go, unless it is closed."""
        self._backoff = Backoff(first_s=OPEN_FIRST_S, most_s=OPEN_MAX_S, rng=rng)
        self._relief_s = float("-inf")
        self._opened_s = float("-inf")
        self._closed_s = float("-inf")

    def may_take(self, now_s: float) -> bool:
        """Whether a request may go there now."""
        return self.state is BreakerState.CLOSED or now_s >= self.until_s

    def sent(self, now_s: float) -> None:
        """A request has gone there: the probe, if one was due."""
        if self.state is not BreakerState.CLOSED and now_s >= self.until_s:
            self.state = BreakerState.HALF_OPEN
            self.until_s = now_s + PROBE_S

    def succeed(self, now_s: float, sent_s: float) -> bool:
        """It did its part of a request that was sent at a time; whether that closes the breaker."""
        self.success_s = now_s
        if now_s - self._relief_s >= RELIEF_S:
            self.strikes, self._relief_s = max(0, self.strikes - 1), now_s
        if self.state is BreakerState.CLOSED or sent_s < self._opened_s:
            # What ran before it opened and ends well now says nothing of those that would come.
            return False
        self.state, self._closed_s = BreakerState.CLOSED, now_s
        return True

    def fail(self, now_s: float, sent_s: float) -> bool:
        """It failed a request that was sent at a time; whether that was the probe, so that it opens again."""
        if self.state is not BreakerState.HALF_OPEN or sent_s < self._opened_s:
            # One that had nowhere else to go may be sent to an open one too: that is no probe.
            return False
        self.open(now_s)
        return True

    def strike(self, now_s: float) -> None:
        """It has failed, once or often, at a moment at which its peers have not."""
        self.strikes += 1
        self.strike_s = now_s

    def open(self, now_s: float) -> None:
        """Send it nothing for a while: longer each time, until it has been well for long."""
        if self.state is BreakerState.CLOSED and now_s - self._closed_s > FORGIVEN_S:
            self._backoff.reset()
        self.state, self._opened_s = BreakerState.OPEN, now_s
        self.until_s = now_s + self._backoff.next_s()
        self.strikes = 0
