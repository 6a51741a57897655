"""Throughput estimate: how fast requests finish, and their service times. Basis of queue waits and deadline checks.

Pure: the clock is passed in. Based on the requests that finished within the last few seconds; without any there is no
estimate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from tandem.clock import Clock
from tandem_frontend.admission.queue import QueuedRequest

WINDOW_S = 5.0
SPREAD = 2.0
"""Standard deviations by which the number of finishes may have been below its mean."""
ENDED_MAX = 512
"""Finished requests kept: enough for a mean, and few enough to iterate over for each new request."""


class Throughput:
    """Of the requests that finished lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, QueuedRequest, float]] = deque(maxlen=ENDED_MAX)
        """(when it finished, the request, its service time in seconds)."""
        self._sorted: tuple[list[float], list[float]] | None = None
        """Service times, and service times per token of the longest completion; None: to be sorted again."""

    def note(self, request: QueuedRequest, service_s: float) -> None:
        """Record that a request has released its slot after `service_s`."""
        self._ended.append((self._clock(), request, service_s))
        self._sorted = None
        self._expire()

    def wait_s(self, tokens: int) -> float | None:
        """Seconds until requests of `tokens` in total have been started; None without an estimate."""
        self._expire()
        ended_tokens = sum(request.tokens for _, request, _ in self._ended)
        if not ended_tokens:
            return None
        # A single request that finished just now would otherwise look like an infinite throughput.
        elapsed_s = max(self._clock() - self._ended[0][0], 0.5)
        return tokens * elapsed_s / ended_tokens

    def least_wait_s(self, tokens: int) -> float | None:
        """As `wait_s`, at the highest throughput that so few finishes leave possible.

        For refusals. After some seconds in which nothing could finish, the first finish alone looks as if each queued
        request took as long.
        """
        wait_s = self.wait_s(tokens)
        return None if wait_s is None else wait_s / (1 + SPREAD / math.sqrt(len(self._ended)))

    def service_s(self, request: QueuedRequest, share: float) -> float:
        """The `share` quantile of service times in seconds, or less where the request's own completion is short.

        0 without an estimate.
        """
        self._expire()
        if self._sorted is None:
            per_token = [service_s / ended.answer_tokens for _, ended, service_s in self._ended if ended.answer_tokens]
            self._sorted = sorted(service_s for *_, service_s in self._ended), sorted(per_token)
        whole, per_token = self._sorted
        whole_s = _quantile(whole, share)
        return min(whole_s, request.answer_tokens * _quantile(per_token, share)) if request.answer_tokens else whole_s

    def _expire(self) -> None:
        oldest_s = self._clock() - WINDOW_S
        while self._ended and self._ended[0][0] < oldest_s:
            self._ended.popleft()
            self._sorted = None


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
