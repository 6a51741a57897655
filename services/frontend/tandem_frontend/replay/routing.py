"""The policies that a replay can run, and what each needs to know: the frontend's own, and an oracle.

Owns the way from the engines' caches and loads to a policy. The oracle alone sees the engines themselves.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

from tandem.domain.worker import Start, Worker, WorkerRole
from tandem.errors import ConfigError
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.job import Job
from tandem_frontend.routing.policy import Policy
from tandem_frontend.routing.pool import Live
from tandem_frontend.routing.random_policy import RandomPolicy

POLICIES = ("random", "oracle")


class OraclePolicy:
    """Picks the worker that will have computed the prompt first, from the engines' own queues and caches, now.

    The best that any policy can know, without the future: a bound for what knowledge alone can reach, not an optimum.
    """

    name = "oracle"

    def __init__(self, engines: Mapping[Start, AccountedEngine]) -> None:
        self._engines = engines
        self.job: Job | None = None
        """The request whose route is being chosen."""
        self._choices = itertools.count(1)
        self._chosen: dict[Start, int] = {}
        """The last choice of each worker. Of equals, the one that was chosen the longest ago goes next."""

    def choose(self, workers: Live) -> Worker:
        """See `Policy`."""
        worker = min(workers, key=self._cost)
        self._chosen[worker.start] = next(self._choices)
        return worker

    def _cost(self, worker: Worker) -> tuple[float, int, str]:
        assert self.job is not None, "a replay sets the request before it asks for a route"
        engine, job = self._engines[worker.start], self.job
        if worker.role is WorkerRole.DECODE:
            cost = float(engine.memory.used_tokens + engine.memory.asked_tokens)
        else:
            cost = engine.backlog_s(job.hashes, job.prompt_tokens)
        return cost, self._chosen.get(worker.start, 0), worker.worker_id


def check_policies(names: tuple[str, ...]) -> None:
    """Check names of policies.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    unknown = next((name for name in names if name not in POLICIES), None)
    if unknown is not None or not names:
        raise ConfigError("policy", f"must be some of {', '.join(POLICIES)}, not {unknown!r}")


def make_policy(name: str, engines: Mapping[Start, AccountedEngine], rng: random.Random) -> Policy:
    """The policy of one frontend."""
    return OraclePolicy(engines) if name == OraclePolicy.name else RandomPolicy(rng)
