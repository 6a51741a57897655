"""The policy `prefix`: least work, where tokens in a worker's prefix cache are no work.

A worker that has a prefix wins only as long as what it has to do costs less than the others' recomputation, so a hot
prefix spreads under load. When the fleet is idle it would not: therefore a worker whose share of this frontend's work
falls below a floor gets the request instead, provided that least work would choose it too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from tandem_frontend.routing.cost_table import CostTable
from tandem_frontend.routing.least_work import WINDOW, least, window
from tandem_frontend.routing.policy import CachedPrefixes, Choice, Job, RoutingRequest
from tandem_frontend.routing.pool import Flat, Live

CACHED_WEIGHT = 2.0
"""How much a cached token counts beside one that waits: recomputing a prefix delays this request, and then others,
because its copy evicts another prefix. ADR 22 has the figures for other weights."""
SHARE_FLOOR = 0.9
"""Of the mean worker's share."""
SHARE_SLACK_REQUESTS = 10
"""Mean requests by which a share may be below the floor: a single conversation stays where it is cached."""


class Prefix:
    """Picks the worker that is done first, by what it has cached."""

    name = "prefix"

    def __init__(
        self,
        tables: Mapping[Job, CostTable],
        prefixes: CachedPrefixes,
        epochs: Mapping[str, int],
        rng: random.Random,
    ) -> None:
        """`epochs` has those of the workers in `tables`: what an earlier start had cached is lost."""
        self._tables = tables
        self._prefixes = prefixes
        self._epochs = epochs
        self._rng = rng
        self._last: tuple[object, dict[str, int]] = (None, {})
        """The last request with its matches: a pair needs them twice."""

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        flat, table, tokens = workers.flat(), self._tables[job], request.prompt_tokens
        ids = window(flat.ids, self._rng)
        costs, cached = table.of(ids, tokens), self._cached(request)
        found = [cached_id for cached_id in cached if cached_id in flat.places]
        worker_id = self._by_load(ids, costs, table, tokens, has_found=bool(found))
        if worker_id is None:
            credit_of = {found_id: CACHED_WEIGHT * cached[found_id] for found_id in _most(found, cached)}
            worker_id = self._credited(flat, ids, costs, table, tokens, credit_of)
        expected = None if request.prompt is None else min(tokens, cached.get(worker_id, 0))
        return Choice(flat.members[flat.places[worker_id]], self.name, expected)

    def _by_load(
        self, ids: Sequence[str], costs: Sequence[float], table: CostTable, tokens: int, *, has_found: bool
    ) -> str | None:
        """The worker of the least cost where nothing is cached, or where that worker starves; None: caches count."""
        floor = SHARE_FLOOR * table.mean_assigned() - SHARE_SLACK_REQUESTS * table.assigned_request()
        if has_found and table.has_assigned(floor):
            return None
        worker_id = least(ids, costs, table, tokens, self._rng)
        return None if has_found and table.rows[worker_id].assigned >= floor else worker_id

    def _credited(
        self,
        flat: Flat,
        ids: Sequence[str],
        costs: list[float],
        table: CostTable,
        tokens: int,
        credit_of: Mapping[str, float],
    ) -> str:
        """The worker of the least cost, of `ids` and of those with a credit, in tokens."""
        lines = table.lines()
        if ids is flat.ids:
            for worker_id, credit in credit_of.items():
                costs[flat.places[worker_id]] -= credit * lines[worker_id].per_token
        else:
            # A worker may be in both lists, and costs less in the first.
            found = [*credit_of]
            ids = [*found, *ids]
            costs = [
                *(
                    cost - credit_of[worker_id] * lines[worker_id].per_token
                    for worker_id, cost in zip(found, table.of(found, tokens), strict=True)
                ),
                *costs,
            ]
        cheapest = ids[costs.index(min(costs))]
        left = tokens - credit_of.get(cheapest, 0.0) / CACHED_WEIGHT
        return least(ids, costs, table, left, self._rng)

    def _cached(self, request: RoutingRequest) -> Mapping[str, int]:
        if request.prompt is None:
            return {}
        if self._last[0] is not request:
            matched = self._prefixes.match(request.prompt)
            epochs = self._epochs
            current = {start[0]: tokens for start, tokens in matched.items() if epochs.get(start[0]) == start[1]}
            self._last = request, current
        return self._last[1]


def _most(found: Sequence[str], cached: Mapping[str, int]) -> Sequence[str]:
    """At most WINDOW of the workers, those that have most cached."""
    return found if len(found) <= WINDOW else sorted(found, key=cached.__getitem__, reverse=True)[:WINDOW]
