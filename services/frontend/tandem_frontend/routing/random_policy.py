"""The policy `random`: uniformly random, without regard to load.

The decode worker is picked first, then a compatible prefill worker: so requests are spread evenly over the decode
workers, where a request stays longest.
"""

from __future__ import annotations

import random

from tandem_frontend.routing.policy import Choice, Job, RoutingRequest
from tandem_frontend.routing.pool import Live


class RandomPolicy:
    """Picks a worker at random."""

    name = "random"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        return Choice(self._rng.choice(workers), self.name)
