"""The policy `least_work`: the worker on which one more request costs least.

Costs within a small band of the least count as equal; among those the worker wins to which this frontend has sent least
lately. So an idle fleet is used evenly, and frontends that read the same reports do not all follow the same worker:
each goes by its own history.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from tandem_frontend.routing.cost_table import CostTable
from tandem_frontend.routing.policy import Choice, Job, RoutingRequest
from tandem_frontend.routing.pool import Live

WINDOW = 64
"""Workers that are compared for one request. The best of so many drawn ones is among the best few of any fleet."""
BAND_SHARE = 1 / 8
"""Costs that differ by less than this share of what the request itself costs count as equal."""


class LeastWork:
    """Picks a worker that is done first."""

    name = "least_work"

    def __init__(self, tables: Mapping[Job, CostTable], rng: random.Random) -> None:
        self._tables = tables
        self._rng = rng

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        flat = workers.flat()
        ids = window(flat.ids, self._rng)
        table, tokens = self._tables[job], request.prompt_tokens
        return Choice(flat.members[flat.places[least(ids, table.of(ids, tokens), table, tokens, self._rng)]], self.name)


def window(ids: Sequence[str], rng: random.Random) -> Sequence[str]:
    """At most WINDOW of the workers, from a random one on."""
    count = len(ids)
    if count <= WINDOW:
        return ids
    begin = int(rng.random() * count)
    end = begin + WINDOW
    return ids[begin:end] if end <= count else [*ids[begin:], *ids[: end - count]]


def least(ids: Sequence[str], costs: Sequence[float], table: CostTable, tokens: float, rng: random.Random) -> str:
    """The worker of the least cost; among about equal ones the one with the least share, at random among those.

    Args:
        ids: of the workers.
        costs: of the request on each.
        table: has their shares.
        tokens: of the request.
        rng: decides between equal ones.
    """
    lowest = min(costs)
    winner = ids[costs.index(lowest)]
    limit = lowest + BAND_SHARE * (table.rows[winner].request_tokens + tokens) * table.lines()[winner].per_token
    equal = [at for at, cost in enumerate(costs) if cost <= limit]
    if len(equal) == 1:
        return winner
    rows = table.rows
    shares = [rows[ids[at]].assigned for at in equal]
    smallest = min(shares)
    found = [at for at, share in zip(equal, shares, strict=True) if share == smallest]
    return ids[found[0] if len(found) == 1 else rng.choice(found)]
