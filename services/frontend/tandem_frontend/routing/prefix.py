"""The policy `prefix`: least work, where tokens in a worker's prefix cache are no work.

A worker that has a prefix wins only as long as what it has to do costs less than the others' recomputation, so a hot
prefix spreads under load. When the fleet is idle it would not: therefore a worker whose share of this frontend's work
falls below a floor gets the request instead, provided that least work would choose it too.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from tandem.domain.worker import Start
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

    def __init__(self, tables: Mapping[Job, CostTable], prefixes: CachedPrefixes, rng: random.Random) -> None:
        self._tables = tables
        self._prefixes = prefixes
        self._rng = rng
        self._last: tuple[object, Mapping[Start, int]] = (None, {})
        """The last request with its matches: a pair needs them twice."""

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`. The router's thread spends most of its time here: no loop but over lists of workers."""
        flat, table, tokens = workers.flat(), self._tables[job], request.prompt_tokens
        ids = window(flat.ids, self._rng)
        costs, cached = table.of(ids, tokens), self._cached(request)
        # By start: what an earlier start of a worker had cached is lost.
        found = cached.keys() & flat.starts.keys() if cached else ()
        worker_id = self._by_load(ids, costs, table, tokens, has_found=bool(found))
        if worker_id is None:
            worker_id = self._credited(flat, ids, costs, table, tokens, _most(found, cached))
        member = flat.members[flat.places[worker_id]]
        expected = None if request.prompt is None else min(tokens, cached.get(member.start, 0))
        return Choice(member, self.name, expected)

    def _by_load(
        self, ids: Sequence[str], costs: Sequence[float], table: CostTable, tokens: int, *, has_found: bool
    ) -> str | None:
        """The worker of the least cost where nothing is cached, or where that worker starves; None: caches count."""
        if not has_found:
            return least(ids, costs, table, tokens, self._rng)
        floor = SHARE_FLOOR * table.mean_assigned() - SHARE_SLACK_REQUESTS * table.assigned_request()
        if table.has_assigned(floor):
            return None
        worker_id = least(ids, costs, table, tokens, self._rng)
        return None if table.rows[worker_id].assigned >= floor else worker_id

    def _credited(
        self,
        flat: Flat,
        ids: Sequence[str],
        costs: list[float],
        table: CostTable,
        tokens: int,
        cached: Mapping[Start, int],
    ) -> str:
        """The worker of the least cost, of `ids` and of those that have some tokens cached."""
        lines, all_ids = table.lines(), flat.ids
        if ids is all_ids:
            starts = flat.starts
            for start, count in cached.items():
                at = starts[start]
                costs[at] -= CACHED_WEIGHT * count * lines[all_ids[at]].per_token
        else:
            # A worker may be in both lists, and costs less in the first.
            found = [start[0] for start in cached]
            ids = [*found, *ids]
            costs = [
                *(
                    cost - CACHED_WEIGHT * count * lines[worker_id].per_token
                    for worker_id, count, cost in zip(found, cached.values(), table.of(found, tokens), strict=True)
                ),
                *costs,
            ]
        at = costs.index(min(costs))
        cheapest = flat.members[flat.places[ids[at]]].start
        return least(ids, costs, table, tokens - cached.get(cheapest, 0), self._rng)

    def _cached(self, request: RoutingRequest) -> Mapping[Start, int]:
        if request.prompt is None:
            return {}
        if self._last[0] is not request:
            self._last = request, self._prefixes.match(request.prompt)
        return self._last[1]


def _most(found: Collection[Start], cached: Mapping[Start, int]) -> Mapping[Start, int]:
    """What they have cached, of at most WINDOW of the workers: those that have most."""
    if len(found) > WINDOW:
        found = sorted(found, key=cached.__getitem__, reverse=True)[:WINDOW]
    return {start: cached[start] for start in found}
