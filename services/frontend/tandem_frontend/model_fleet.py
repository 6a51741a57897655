"""The workers of one model as this frontend sees them: their part of the view, and every part that follows it.

Owns the order in which a new view reaches the parts of one model: two models have none in common, so that nothing that
happens to the workers of one changes a route of another. `fleet` has what all workers share.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tandem.api.types.v1 import leg_pb2
from tandem.client.kv_watch import KvWatch
from tandem.clock import monotonic
from tandem.domain.adapter import Adapter
from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.observability.metrics import Metrics
from tandem.rpc.channels import Channels
from tandem.rpc.convert import present
from tandem_frontend.adapter_fleets import AdapterFleets
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import FrontendConfig
from tandem_frontend.execution.dispatch import Dispatch
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.adapter_view import AdapterView, without_adapters
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.local_prefill import LocalPrefill
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import PolicyName
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_costs import WorkerCosts
from tandem_frontend.routing.worker_health import WorkerHealth


class WorkerFollower(Protocol):
    """What admission computes from the workers."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new view."""
        ...

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Record a worker's load; None: unknown."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerAccess:
    """How the workers of every model are reached."""

    channels: Channels
    health: WorkerHealth
    links: WorkerLinks


class ModelFleet:
    """The workers of one model: their breakers, routes, costs and caches."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ServedModel,
        access: WorkerAccess,
        followers: tuple[WorkerFollower, ...],
        backlog: PrefillBacklog,
        reevaluate: Callable[[], None],
        metrics: Metrics | None = None,
    ) -> None:
        """Knows no worker yet.

        Args:
            config: the routing policy and its limits.
            model: the model that routes are chosen for.
            access: connections to workers.
            followers: get the view and the load of each worker.
            backlog: what the workers have to compute; gets the view and the loads too.
            reevaluate: called after each change: a queued request may fit now.
            metrics: of this process; None: none.
        """
        costs = WorkerCosts(backlog)
        local = LocalPrefill(costs, backlog, config.local_prefill_settings) if config.local_prefill else None
        self.name = model.name
        self._workers: tuple[Worker, ...] = ()
        self._followers = (*followers, costs, *(() if local is None else (local,)))
        self._reevaluate = reevaluate
        self._no_worker_wait_s = config.no_worker_wait_s
        self._breakers = CircuitBreakers(monotonic, random.SystemRandom(), access.health.unhealthy)
        policy = PolicyName(config.routing_policy)
        follows_caches = config.prefix_blocks_max > 0 and policy in {PolicyName.AUTO, PolicyName.PREFIX}
        self.prefixes = PrefixIndex(config.prefix_blocks_max) if follows_caches else None
        """The workers' cached blocks; None: they are not followed, and routing goes by load alone."""
        self._caches = None if self.prefixes is None else KvWatch(access.channels, self.prefixes, metrics)
        # Seeded by the system, so that no two processes choose alike; no value is a secret.
        rng = random.Random()  # noqa: S311 -- see above
        refusals = RecentRefusals(monotonic)
        chooser = make_policy(policy, costs, self.prefixes, rng)
        self.routes = Routes(
            model, self.workers, access.health.unhealthy, refusals, self._breakers, rng, chooser, costs, local
        )
        dispatch = Dispatch(access.links, rng)

        def execute(routes: Routes, adapter: Callable[[], Adapter | None]) -> ExecutionDeps:
            return ExecutionDeps(
                routes, refusals, self._breakers, dispatch, monotonic, rng,
                lambda leg: self._blocks_of(leg, adapter()), config.no_worker_wait_s,
            )  # fmt: skip

        self.execution = execute(self.routes, lambda: None)

        def execute_adapter(view: AdapterView) -> ExecutionDeps:
            routes = Routes(
                model, lambda: view.workers, access.health.unhealthy, refusals, self._breakers, rng, chooser, costs,
                local, explain=view.why_none, leads=False,
            )  # fmt: skip
            return execute(routes, lambda: view.adapter)

        self.adapters = AdapterFleets(execute_adapter)

    def workers(self) -> tuple[Worker, ...]:
        """The model's workers in the present view, without adapters; the same object until one of them changes."""
        return self._workers

    def ejected(self) -> frozenset[Start]:
        """Workers whose circuit breakers keep requests away from them."""
        return self._breakers.ejected()

    def follow(self, workers: tuple[Worker, ...]) -> bool:
        """Pass a new view of the model's workers on to every part. Returns whether it differs from the last one."""
        plain = tuple(map(without_adapters, workers))
        has_changed = plain != self._workers and self._follow(plain)
        # After the model's own parts, which its adapters share.
        return self.adapters.follow(workers) or has_changed

    def _follow(self, workers: tuple[Worker, ...]) -> bool:
        # Unchanged workers keep their objects, by which the parts below recognise them.
        known = {worker.start: worker for worker in self._workers}
        workers = self._workers = tuple(
            old if (old := known.get(worker.start)) == worker and old is not None else worker for worker in workers
        )
        self._breakers.follow(workers)
        for follower in self._followers:
            follower.follow(workers)
        self.routes.follow(workers)
        if self._caches is not None:
            # Before the loads: those of workers that have left end now, and are no sign of silence.
            self._caches.follow(workers)
        return True

    def act(self) -> None:
        """Act on the new view, after every part has it: fail what was lost, and start what fits now."""
        self.execution.notice(self._workers)
        self.adapters.act()
        self._reevaluate()
        if not self.execution.missing.has_route:
            # What the queue kept back for successors that have not come goes to routing, which refuses it.
            asyncio.get_running_loop().call_later(self._no_worker_wait_s, self._reevaluate)

    def note_load(self, start: Start, load: EngineLoad | None) -> None:
        """Pass on the load of a worker; None: it is unknown."""
        if load is None and self._caches is not None:
            # A worker whose load reports have stopped may have stopped its cache events as well.
            self._caches.silent(start)
        for follower in self._followers:
            follower.note(start, load)
        self._reevaluate()

    async def close(self) -> None:
        """End the streams of cache events."""
        if self._caches is not None:
            await self._caches.close()

    def _blocks_of(self, leg: leg_pb2.LegRequest, adapter: Adapter | None) -> PromptBlocks | None:
        """What the index matches of a request; None: no cache is followed."""
        if self.prefixes is None:
            return None
        salt = present(leg, "cache_salt", leg.cache_salt)
        return PromptBlocks(leg.token_ids, salt, None if adapter is None else adapter.engine_id)
