"""How fast places are given back, and for how long one is held: what the line and the deadlines are reckoned with.

Pure: the clock is given. Looks back a few seconds; who asks after that is told that nobody knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tandem.clock import Clock
from tandem_frontend.admission.queue import QueuedRequest

WINDOW_S = 5.0
ENDED_MAX = 512
"""Requests that are looked back at, at most: enough for a mean, and few enough to be looked at for each newcomer."""


class Pace:
    """Of the requests that have ended lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, QueuedRequest, float]] = deque(maxlen=ENDED_MAX)
        """(when, what was asked for, seconds held)."""
        self._sorted: tuple[list[float], list[float]] | None = None
        """Seconds held, and seconds held for each token of the longest answer; None: to be sorted anew."""

    def note(self, demand: QueuedRequest, held_s: float) -> None:
        """A request has given back the place that it has held for so long."""
        self._ended.append((self._clock(), demand, held_s))
        self._sorted = None
        self._forget()

    def seconds(self, tokens: int) -> float | None:
        """How long the places take that so many tokens need; None when nothing has ended lately."""
        self._forget()
        ended = sum(demand.tokens for _, demand, _ in self._ended)
        if not ended:
            return None
        elapsed_s = max(self._clock() - self._ended[0][0], 0.5)
        return tokens * elapsed_s / ended

    def held_s(self, demand: QueuedRequest, share: float) -> float:
        """Within which time such a share of requests ends, or less where its own answer is short.

        0 when nothing has ended lately.
        """
        self._forget()
        if self._sorted is None:
            for_tokens = [held_s / asked.answer_tokens for _, asked, held_s in self._ended if asked.answer_tokens]
            self._sorted = sorted(held_s for *_, held_s in self._ended), sorted(for_tokens)
        held, for_token = self._sorted
        whole_s = _of_share(held, share)
        return min(whole_s, demand.answer_tokens * _of_share(for_token, share)) if demand.answer_tokens else whole_s

    def _forget(self) -> None:
        oldest_s = self._clock() - WINDOW_S
        while self._ended and self._ended[0][0] < oldest_s:
            self._ended.popleft()
            self._sorted = None


def _of_share(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
