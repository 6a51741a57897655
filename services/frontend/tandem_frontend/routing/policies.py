"""All routing policies by the name of their setting, and `auto`, which changes between two of them.

Owns the table of names; each policy has its own module.
"""

from __future__ import annotations

import random

from tandem_frontend.routing.least_work import LeastWork
from tandem_frontend.routing.policy import CachedPrefixes, Choice, Job, Policy, PolicyName, RoutingRequest
from tandem_frontend.routing.pool import Live
from tandem_frontend.routing.power_of_two import PowerOfTwo
from tandem_frontend.routing.prefix import Prefix
from tandem_frontend.routing.random_policy import RandomPolicy
from tandem_frontend.routing.session import Session
from tandem_frontend.routing.worker_costs import WorkerCosts


class Auto:
    """`prefix` while the prefix cache of any worker is known, `least_work` otherwise: decided for each choice."""

    name = "auto"

    def __init__(self, prefix: Policy, least_work: Policy, prefixes: CachedPrefixes) -> None:
        self._prefix = prefix
        self._least_work = least_work
        self._prefixes = prefixes

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        policy = self._prefix if self._prefixes.is_live else self._least_work
        return policy.choose(workers, request, job)


def make_policy(name: PolicyName, costs: WorkerCosts, prefixes: CachedPrefixes | None, rng: random.Random) -> Policy:
    """The policy of a setting.

    Args:
        name: the setting.
        costs: of the workers.
        prefixes: what their caches have; None: nothing follows them, and prefixes are not regarded.
        rng: draws, and decides between equal workers.
    """
    tables = costs.tables
    match name:
        case PolicyName.RANDOM:
            return RandomPolicy(rng)
        case PolicyName.POWER_OF_TWO:
            return PowerOfTwo(tables, rng)
        case PolicyName.SESSION:
            return Session(tables, rng)
        case PolicyName.LEAST_WORK:
            return LeastWork(tables, rng)
    least_work = LeastWork(tables, rng)
    if prefixes is None:
        return least_work
    prefix = Prefix(tables, prefixes, rng)
    return prefix if name is PolicyName.PREFIX else Auto(prefix, least_work, prefixes)
