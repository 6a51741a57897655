"""Who did not take a leg a moment ago: a worker that is gone is listed until its lease runs out.

Pure: the clock is given. Such a worker is avoided, never excluded: whoever has no alternative may try it.
"""

from __future__ import annotations

from tandem.model.worker import Start, Worker
from tandem.runtime.clock import Clock

AVOIDED_S = 1.0


class Refusals:
    """Remembers starts of workers for a short while. A new start of the same worker begins with a clean sheet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[Start, float] = {}

    def note(self, worker: Worker) -> None:
        """It has not taken a leg."""
        self._until_s[worker.start] = self._clock() + AVOIDED_S

    def recent(self) -> frozenset[Start]:
        """Those to be avoided now."""
        now_s = self._clock()
        self._until_s = {start: until_s for start, until_s in self._until_s.items() if until_s > now_s}
        return frozenset(self._until_s)
