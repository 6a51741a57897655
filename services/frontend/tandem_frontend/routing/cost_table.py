"""What one more request costs each worker, kept ready for choices: a line, base + slope x tokens, per worker.

Pure; the clock is passed in. Updated when something happens to a worker, so that a choice only reads. Between updates a
cost falls by the time that passes, up to the prompt that the worker has in hand. An unknown load is never taken for an
idle worker: this frontend's own part of it is known, the rest is taken to be what other frontends have at the mean
worker of known load, and one request more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tandem.clock import Clock

SHARE_REQUESTS = 200
"""Requests per worker after which an assigned one weighs a third."""
SHARE_WEIGHT_MAX = 1e9
MEANS_DRIFT = 0.02
"""Relative change of a mean after which the workers that are charged with it are charged anew."""


class Cost(NamedTuple):
    """Cost of one more request on a worker, in the table's unit: max(falling - now, least) + tokens x per_token."""

    falling: float
    """Of what the worker has to do and of a request without tokens, plus the time since when it falls, by one per
    second."""
    least: float
    """Below which it does not fall."""
    per_token: float


@dataclass(slots=True)
class Row:
    """What is known of one worker."""

    request_tokens: float
    """What a request costs beside its tokens."""
    work: float = 0.0
    """Tokens that it has to process, as far as known."""
    own: float = 0.0
    """The part of `work` that this frontend has sent; all of it where nothing else is known."""
    per_token: float | None = None
    """Cost of one token; None: not measured, the mean of the others counts."""
    is_known: bool = False
    """Whether `work` is based on a current report of the worker."""
    requests: float = 0.0
    """Requests that it has, as far as known."""
    since_s: float = 0.0
    """Since when it is at work on what it has in hand."""
    in_hand: float = 0.0
    """The part of `work` that it has in hand, in tokens; 0: unknown, or not measured in time."""
    assigned: float = 0.0
    """Tokens of the requests that this frontend has sent lately, recent ones weighted more; on a worker of half the
    mean rate each counts as two."""


class CostTable:
    """The costs of the workers of one job, by worker id."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.rows: dict[str, Row] = {}
        self._costs: dict[str, Cost] = {}
        self._estimated: set[str] = set()
        """Workers whose cost depends on the means."""
        self._has_changed = False
        """Whether the means may have moved since they were last compared."""
        self._others_sum, self._known_count = 0.0, 0
        self._slope_sum, self._slope_count = 0.0, 0
        self._estimated_by = 0.0, 1.0
        """The mean work of others and cost of a token when all of `_estimated` were last estimated."""
        self._weight = 1.0
        self._assigned_sum, self._assigned_count = 0.0, 0.0
        self._assigned_least = 0.0
        """No worker has less of `Row.assigned`; one may have been given more since."""
        self._assigned_since = 0
        """Requests assigned since the least was looked up."""
        self.requests_sum = 0.0
        """Of all workers."""

    @property
    def has_rate(self) -> bool:
        """Whether the rate of any worker is known, so that costs of computing are in seconds."""
        return self._slope_count > 0

    def add(self, worker_id: str, row: Row) -> None:
        """Add a worker, or replace it. It begins with the mean share: a newcomer is not flooded."""
        self.remove(worker_id)
        row.assigned = self._assigned_sum / len(self.rows) if self.rows else 0.0
        self._assigned_sum += row.assigned
        self._assigned_least = min(self._assigned_least, row.assigned)
        self.rows[worker_id] = row
        self._count(row, 1)
        self._price(worker_id, row)

    def remove(self, worker_id: str) -> None:
        """Remove a worker; does nothing without it."""
        row = self.rows.pop(worker_id, None)
        if row is None:
            return
        self._count(row, -1)
        self._assigned_sum -= row.assigned
        del self._costs[worker_id]
        self._estimated.discard(worker_id)

    def update(
        self,
        worker_id: str,
        *,
        work: float,
        own: float,
        per_token: float | None,
        is_known: bool,
        requests: float,
        since_s: float = 0.0,
        in_hand: float = 0.0,
    ) -> None:
        """Replace what is known of a worker."""
        row = self.rows.get(worker_id)
        if row is None:
            return
        self._count(row, -1)
        row.work, row.own, row.per_token, row.is_known = work, own, per_token, is_known
        row.requests, row.since_s, row.in_hand = requests, since_s, in_hand
        self._count(row, 1)
        self._price(worker_id, row)

    def of(self, worker_ids: Iterable[str], tokens: float) -> list[float]:
        """Costs of a request with so many tokens now, on each of the workers."""
        now_s, known = self._clock(), self.lines()
        return [
            (base if (base := falling - now_s) > least else least) + tokens * per_token
            for falling, least, per_token in map(known.__getitem__, worker_ids)
        ]

    def lines(self) -> dict[str, Cost]:
        """The line of every worker; valid until the next change. Takes time only when the means have moved."""
        if self._has_changed:
            self._has_changed = False
            others, slope = means = self._mean_others(), self._mean_slope()
            others_then, slope_then = self._estimated_by
            # Less than a token is a rounding error of the sums.
            drift = MEANS_DRIFT * max(others_then, 1 / MEANS_DRIFT)
            if abs(others - others_then) > drift or abs(slope - slope_then) > MEANS_DRIFT * slope_then:
                for worker_id in self._estimated:
                    self._costs[worker_id] = self._estimate(self.rows[worker_id])
                self._estimated_by = means
        return self._costs

    def assign(self, worker_id: str, tokens: float) -> None:
        """Record a request with so many tokens to be processed by a worker."""
        row = self.rows.get(worker_id)
        if row is None:
            return
        # By the mean rate, so that requests from before the first measurement count like later ones.
        slope = 1.0 if row.per_token is None else row.per_token / self._mean_slope()
        # Instead of shrinking every row, each new request weighs more than the one before.
        self._weight *= 1 + 1 / (SHARE_REQUESTS * len(self.rows))
        added = (row.request_tokens + tokens) * slope * self._weight
        row.assigned += added
        self._assigned_since += 1
        self._assigned_sum += added
        self._assigned_count += self._weight
        if self._weight > SHARE_WEIGHT_MAX:
            self._rescale()

    def mean_assigned(self) -> float:
        """Mean of `Row.assigned`."""
        return self._assigned_sum / max(1, len(self.rows))

    def has_assigned(self, least: float) -> bool:
        """Whether every worker certainly has as much as `least` of `Row.assigned`; iterates over them only seldom."""
        if self._assigned_least < least and self._assigned_since >= len(self.rows):
            self._assigned_least = min((row.assigned for row in self.rows.values()), default=0.0)
            self._assigned_since = 0
        return self._assigned_least >= least

    def assigned_request(self) -> float:
        """What one recent request adds to `Row.assigned` on average."""
        return self._weight * self._assigned_sum / self._assigned_count if self._assigned_count else 0.0

    def _rescale(self) -> None:
        for row in self.rows.values():
            row.assigned /= self._weight
        self._assigned_sum = sum(row.assigned for row in self.rows.values())
        self._assigned_count /= self._weight
        self._assigned_least /= self._weight
        self._weight = 1.0

    def _price(self, worker_id: str, row: Row) -> None:
        is_estimated = not row.is_known or row.per_token is None
        (self._estimated.add if is_estimated else self._estimated.discard)(worker_id)
        self._costs[worker_id] = self._estimate(row)

    def _estimate(self, row: Row) -> Cost:
        slope = self._mean_slope() if row.per_token is None else row.per_token
        work = row.work
        if not row.is_known:
            # Not the mean worker's whole work: no worker has less than the least of those known, which is never more
            # than their mean. One lost load stream would leave its worker idle, and a worker that hangs would get all.
            work = row.own + self._mean_others() + row.request_tokens
        # Without a measured rate costs are in tokens, and nothing is known of the progress.
        fall_max = 0.0 if row.per_token is None else min(row.in_hand, work) * slope
        base = (work + row.request_tokens) * slope
        return Cost(base + row.since_s, base - fall_max, slope)

    def _mean_others(self) -> float:
        """What a worker of known load has from other frontends."""
        return max(0.0, self._others_sum / self._known_count) if self._known_count else 0.0

    def _mean_slope(self) -> float:
        """Without any measurement every worker is taken to be equally fast."""
        return self._slope_sum / self._slope_count if self._slope_count else 1.0

    def _count(self, row: Row, sign: int) -> None:
        """Add a row to the means, or take it out."""
        self._has_changed = True
        self.requests_sum += sign * row.requests
        if row.is_known:
            self._known_count += sign
            others = max(0.0, row.work - row.own)
            self._others_sum = self._others_sum + sign * others if self._known_count else 0.0
        if row.per_token is not None:
            self._slope_count += sign
            self._slope_sum = self._slope_sum + sign * row.per_token if self._slope_count else 0.0
