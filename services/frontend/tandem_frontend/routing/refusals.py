"""Who did not take a leg a moment ago: a worker that is gone is listed until its lease runs out.

Pure: the clock is given. Such a worker is avoided, never excluded: a request without an alternative may try it.
"""

from __future__ import annotations

from tandem.clock import Clock
from tandem.domain.worker import Start, Worker

AVOIDED_S = 1.0


class Refusals:
    """Remembers starts of workers for a short while. A new start of the same worker begins with a clean sheet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[Start, float] = {}
        """In order of time."""
        self._recent: frozenset[Start] | None = frozenset()
        """The keys of `_until_s`; None: they have changed since."""

    def note(self, worker: Worker) -> None:
        """It has not taken a leg."""
        if self._until_s.pop(worker.start, None) is None:
            self._recent = None
        self._until_s[worker.start] = self._clock() + AVOIDED_S

    def recent(self) -> frozenset[Start]:
        """Those to be avoided now; the same object until one comes or goes."""
        if self._until_s:
            self._forget(self._clock())
        if self._recent is None:
            self._recent = frozenset(self._until_s)
        return self._recent

    def _forget(self, now_s: float) -> None:
        while self._until_s:
            start = next(iter(self._until_s))
            if self._until_s[start] > now_s:
                return
            del self._until_s[start]
            self._recent = None
