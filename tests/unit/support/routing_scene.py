"""Routes over workers of which a test says how they are."""

from __future__ import annotations

import random
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.local_prefill import LocalPrefill
from tandem_frontend.routing.policy import Choice, Job, Policy, RoutingRequest
from tandem_frontend.routing.pool import Live
from tandem_frontend.routing.router import Routes
from tandem_frontend.routing.worker_costs import WorkerCosts

from tandem.domain.worker import Start, Worker
from tests.unit.support.frontend_workers import CAPABILITIES

DIGEST = CAPABILITIES.tokenizer_digest


class ByIndex:
    """Chooses what the test wants, and remembers what it could choose from."""

    name = "by index"

    def __init__(self) -> None:
        self.wanted = 0
        self.offered: list[list[Start]] = []

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        index = self.wanted if not self.offered else 0
        self.offered.append([worker.start for worker in workers])
        assert [workers[index].start for index in range(len(workers))] == self.offered[-1]
        return Choice(workers[index], self.name)


class Scene:
    """The parts that a choice asks; each answers what was set."""

    def __init__(
        self,
        *workers: Worker,
        policy: Policy | None = None,
        costs: WorkerCosts | None = None,
        local: LocalPrefill | None = None,
    ) -> None:
        self.workers = workers
        self.unhealthy = self.failing = self.refused = frozenset[Start]()
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=DIGEST)), {})
        refusals = cast("Any", SimpleNamespace(recent=lambda: self.refused))
        breakers = cast("Any", SimpleNamespace(ejected=lambda: self.failing))
        self.routes = Routes(
            *(model, lambda: self.workers, lambda: self.unhealthy, refusals, breakers, random.Random(0)),
            *(policy, costs, local),
        )

    def first(self, prompt_tokens: int = 1) -> Route:
        return self.routes.first(RoutingRequest(prompt_tokens))

    def next(self, prompt_tokens: int, tried: Collection[Start], refused: Collection[Start]) -> Route | None:
        return self.routes.next(RoutingRequest(prompt_tokens), tried, refused)
