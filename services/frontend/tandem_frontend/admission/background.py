"""How many requests of low priority may run: what fits while nothing else runs, and few beside live requests.

Pure but for its clock. A step of an engine takes a + b * n for n running requests, whatever a and b are. So n live ones
lose at most a fraction f of their speed to f * n others, and the mean over time counts as well: requests beside live
ones are paid from a budget of f * n request-seconds a second. So they never starve, however few live ones there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tandem.clock import Clock

QUIET_S = 1.0
"""So long without a live request, and the workers are idle: a client that sends one after the other is never."""
OTHERS_WINDOW_S = 3.0
"""The load of other frontends is what was there all this time: a worker's report is 0.25 s old, or with more than 50
workers up to as long as `LoadWatch` makes its interval, so that single ones count requests that have ended."""
CREDIT_MAX_S = 10.0
"""Request-seconds that can be saved up: a burst beside live requests is no longer."""


class Workers(Protocol):
    """Capacity of the workers and their load; see `capacity.Capacity`."""

    def others(self, held_requests: int, held_tokens: int) -> tuple[int, int]:
        """Requests and KV tokens of other frontends."""
        ...

    def fits_beside(self, requests: int, tokens: int) -> bool:
        """Whether there is capacity for so many requests and KV tokens in all."""
        ...


class OtherFrontends:
    """What other frontends have on the workers of one model."""

    def __init__(
        self, workers: Workers, clock: Clock, before_change: Callable[[], None], after_change: Callable[[], None]
    ) -> None:
        """`before_change` and `after_change` are called around each change."""
        self._workers = workers
        self._clock = clock
        self._before_change = before_change
        self._after_change = after_change
        self._seen: deque[tuple[float, int, int]] = deque()
        """Of the last `OTHERS_WINDOW_S`: when, and requests and KV tokens."""
        self.requests, self._tokens = 0, 0
        """What was there all that time."""

    def look(self, held_requests: int, held_tokens: int) -> None:
        """Look at their load, beside what this frontend holds. Called several times a second."""
        self._before_change()
        now_s = self._clock()
        self._seen.append((now_s, *self._workers.others(held_requests, held_tokens)))
        while self._seen[0][0] < now_s - OTHERS_WINDOW_S:
            self._seen.popleft()
        self.requests = min(requests for _, requests, _ in self._seen)
        self._tokens = min(tokens for _, _, tokens in self._seen)
        self._after_change()

    def fits_beside(self, requests: int, tokens: int) -> bool:
        """Whether the workers have capacity for so many requests and KV tokens of this frontend."""
        return self._workers.fits_beside(self.requests + requests, self._tokens + tokens)


class BackgroundShare:
    """Counts live requests and those of low priority, and says how many of these may start and must stop."""

    def __init__(
        self,
        most: int,
        per_live: float,
        clock: Clock,
        on_excess: Callable[[], None] = lambda: None,
    ) -> None:
        """Create it without requests.

        Args:
            most: requests of low priority that run at a time.
            per_live: how many of them may run for each live request, in the mean.
            clock: monotonic.
            on_excess: called when live requests begin and some of low priority must stop.
        """
        self.most = most
        self.on_excess = on_excess
        self._per_live = per_live
        self._clock = clock
        self._own = 0
        self._others: list[OtherFrontends] = []
        """For each model."""
        self._rows = 0
        self._generations = 0
        self._credit_s = 0.0
        self._seen_s = clock()
        self._live_until_s = -math.inf
        """When a live request was open last."""

    @property
    def live(self) -> int:
        """Live requests of this frontend, and of all others as far as the workers report them."""
        return self._own + sum(others.requests for others in self._others)

    @property
    def room(self) -> int:
        """How many may start now."""
        self._advance()
        running = max(self._rows, self._generations)
        if self._is_quiet():
            return max(0, self.most - running)
        if self._credit_s <= 0:
            return 0
        return max(0, min(self.most, max(1, math.floor(self._per_live * self.live))) - running)

    @property
    def excess(self) -> int:
        """How many must stop now. One may always end: it is paid for afterwards."""
        live = self.live
        if not live:
            return 0
        return max(0, self._rows - max(1, math.ceil(self._per_live * live)))

    def note_live(self, count: int) -> None:
        """So many live requests of this frontend are open now."""
        self._advance()
        self._own = count
        self._stop_excess()

    @property
    def unstarted(self) -> int:
        """Rows that have a place and no generation yet: they hold no capacity of the workers, and will."""
        return max(0, self._rows - self._generations)

    def add(self, workers: Workers) -> OtherFrontends:
        """Count what other frontends have on the workers of one more model."""
        others = OtherFrontends(workers, self._clock, self._advance, self._stop_excess)
        self._others.append(others)
        return others

    def remove(self, others: OtherFrontends) -> None:
        """Count the workers of a model no more."""
        self._advance()
        self._others.remove(others)

    def note_rows(self, count: int) -> None:
        """So many rows run now, without those that are stopping."""
        self._advance()
        self._rows = count

    def begin(self) -> None:
        """A generation of low priority begins; a row may have several."""
        self._advance()
        self._generations += 1

    def end(self) -> None:
        """A generation of low priority has ended."""
        self._advance()
        self._generations -= 1

    def _stop_excess(self) -> None:
        if self._rows and self.excess:
            self.on_excess()

    def _is_quiet(self) -> bool:
        return not self.live and self._clock() - self._live_until_s >= QUIET_S

    def _advance(self) -> None:
        """Pay for the time since the last change. Nothing is paid, and nothing saved, without live requests."""
        now_s = self._clock()
        elapsed_s, self._seen_s = now_s - self._seen_s, now_s
        live = self.live
        if live:
            self._live_until_s = now_s
            running = max(self._rows, self._generations)
            self._credit_s = min(CREDIT_MAX_S, self._credit_s + (self._per_live * live - running) * elapsed_s)
