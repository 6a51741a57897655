"""Exponential back-off with jitter: the retry policy of all long-lived streams.

Requests are retried by `tandem_frontend.execution.request_stream`.
"""

from __future__ import annotations

import random


class Backoff:
    """Delays that double from `first_s` to `most_s`, each drawn from the upper half of its range."""

    def __init__(self, *, first_s: float = 0.1, most_s: float = 1.0, rng: random.Random | None = None) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._failure_count = 0

    def next_s(self) -> float:
        """Seconds to wait after one more failure."""
        bound_s = min(self._most_s, self._first_s * 2.0 ** min(self._failure_count, 30))
        self._failure_count += 1
        return bound_s * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from `first_s`, after a success."""
        self._failure_count = 0
