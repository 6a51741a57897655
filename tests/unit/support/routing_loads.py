"""Policies over workers whose loads a test reports."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.local_prefill import LocalPrefill, LocalPrefillSettings
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import PolicyName, RoutingRequest
from tandem_frontend.routing.worker_costs import SentRequest, WorkerCosts

from tandem.clock import ManualClock
from tandem.domain.worker import EngineLoad, Start, Worker
from tests.unit.support.routing_scene import Scene

Prompt = Mapping[Start, int]
"""A prompt that says who has how much of it cached."""


class Caches:
    """Knows of each prompt what the prompt says."""

    def __init__(self) -> None:
        self.is_live = True

    def match(self, prompt: Prompt) -> Prompt:
        return prompt


class Loaded:
    """A policy, the costs that it reads, and the routes over some workers."""

    def __init__(
        self,
        policy: PolicyName,
        *workers: Worker,
        seed: int = 1,
        rule: LocalPrefillSettings | None = None,
        limit_s: float = math.inf,
    ) -> None:
        """`rule`: settings of conditional disaggregation; None: without it."""
        self.clock = ManualClock(100.0)
        self.backlog = PrefillBacklog("m", limit_s)
        self.costs = WorkerCosts(self.backlog, self.clock)
        self.caches = Caches()
        made = make_policy(policy, self.costs, self.caches, random.Random(seed))
        self.local = None if rule is None else LocalPrefill(self.costs, self.backlog, rule, self.clock)
        self.scene = Scene(*workers, policy=made, costs=self.costs, local=self.local)
        self.scene.routes.follow(workers)

    def report(
        self,
        worker: Worker,
        waiting_tokens: int = 0,
        running: int = 0,
        kv_used_tokens: int = 0,
        computed_tokens: int | None = None,
    ) -> None:
        load = EngineLoad(
            running_requests=running,
            waiting_requests=0,
            waiting_tokens=waiting_tokens,
            kv_used_tokens=kv_used_tokens,
            computed_tokens=computed_tokens,
        )
        self.costs.note(worker.start, load)
        if self.local is not None:
            self.local.note(worker.start, load)

    def report_all(self) -> None:
        for worker in self.scene.workers:
            self.report(worker)

    def choose(self, tokens: int = 100, prompt: Prompt | None = None, session: str = "", tenant: str = "") -> Route:
        return self.scene.routes.first(RoutingRequest(tokens, prompt, session, tenant))

    def send(self, route: Route, tokens: int = 100) -> tuple[PrefillWork, SentRequest]:
        work = self.backlog.reserve(tokens)
        work.sent(route.computing.start, route.expected_cached_tokens or 0)
        return work, self.scene.routes.sent(route, tokens)
