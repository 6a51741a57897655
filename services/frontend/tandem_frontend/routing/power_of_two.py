"""The policy `power_of_two`: of two workers drawn at random, the one on which one more request costs less.

Takes the same time in every fleet, and cannot herd: no worker is compared with more than one other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from tandem_frontend.routing.cost_table import CostTable
from tandem_frontend.routing.policy import Choice, Job, RoutingRequest
from tandem_frontend.routing.pool import Live


class PowerOfTwo:
    """Picks the better one of two workers."""

    name = "power_of_two"

    def __init__(self, tables: Mapping[Job, CostTable], rng: random.Random) -> None:
        self._tables = tables
        self._rng = rng

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        count = len(workers)
        at = self._rng.randrange(count)
        worker = workers[at]
        if count > 1:
            # The second one is drawn from the others: the same worker twice would be a choice at random.
            another = workers[(at + self._rng.randrange(1, count)) % count]
            costs = self._tables[job].of((worker.worker_id, another.worker_id), request.prompt_tokens)
            if costs[1] < costs[0]:
                worker = another
        return Choice(worker, self.name)
