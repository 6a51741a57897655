"""The workers as this frontend sees them: one view, and every part that follows it.

Owns the connections to workers and the order in which a new view reaches the parts. `app` opens it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

from tandem.api.types.v1 import leg_pb2
from tandem.client.kv_watch import KvWatch
from tandem.client.load_watch import LoadWatch
from tandem.client.step_calls import WorkerCalls
from tandem.clock import monotonic
from tandem.discovery import WorkerWatch
from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.observability.metrics import Metrics
from tandem.rpc.channels import Channels
from tandem.rpc.convert import present
from tandem.service.awake_timers import AwakeTimers
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import FrontendConfig
from tandem_frontend.execution.dispatch import Dispatch
from tandem_frontend.execution.link_leg import Bounds
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.preparation.served_model import ServedModel
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


class Fleet:
    """The workers that the registry lists: their view, health, load, links and routes."""

    def __init__(
        self,
        config: FrontendConfig,
        instance: str,
        model: ServedModel,
        followers: tuple[WorkerFollower, ...],
        backlog: PrefillBacklog,
        reevaluate: Callable[[], None],
        metrics: Metrics | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            config: registries, TLS and timeouts of legs.
            instance: unique name of this process, for workers.
            model: the model that routes are chosen for.
            followers: get the view and the load of each worker.
            backlog: what the workers have to compute; gets the view and the loads too.
            reevaluate: called after each change: a queued request may fit now.
            metrics: of this process; None: none.
        """
        costs = WorkerCosts(backlog)
        local = LocalPrefill(costs, backlog, config.local_prefill_settings) if config.local_prefill else None
        self._followers = (*followers, costs, *(() if local is None else (local,)))
        self._reevaluate = reevaluate
        self._no_worker_wait_s = config.no_worker_wait_s
        self._known_starts: set[tuple[str, Start]] = set()
        """(address, start) of all workers of the view."""
        self.channels = Channels(config.tls)
        self._timers = AwakeTimers()
        self._health = WorkerHealth(self.channels, self._timers)
        self._breakers = CircuitBreakers(monotonic, random.SystemRandom(), self._health.unhealthy)
        self.loads = LoadWatch(self.channels, on_change=self.note_load)
        policy = PolicyName(config.routing_policy)
        follows_caches = config.prefix_blocks_max > 0 and policy in {PolicyName.AUTO, PolicyName.PREFIX}
        self.prefixes = PrefixIndex(config.prefix_blocks_max) if follows_caches else None
        """The workers' cached blocks; None: they are not followed, and routing goes by load alone."""
        self._caches = None if self.prefixes is None else KvWatch(self.channels, self.prefixes, metrics)
        bounds = Bounds(config.leg_accept_timeout_s, config.leg_silence_timeout_s)
        calls = WorkerCalls(self.channels)
        self._links = WorkerLinks(instance, calls, bounds, self._timers, self._health.check)
        self.watch = WorkerWatch(config.registry, tls=config.tls, on_change=self.follow)
        # Seeded by the system, so that no two processes choose alike; no value is a secret.
        rng = random.Random()  # noqa: S311 -- see above
        refusals = RecentRefusals(monotonic)
        chooser = make_policy(policy, costs, self.prefixes, rng)
        self.routes = Routes(
            model, self.watch.workers, self._health.unhealthy, refusals, self._breakers, rng, chooser, costs, local
        )
        dispatch = Dispatch(self._links, rng)
        self.execution = ExecutionDeps(
            self.routes, refusals, self._breakers, dispatch, monotonic, rng, self._blocks_of, config.no_worker_wait_s
        )

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Follow the registry's view and watch its workers; close every connection on exit."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.channels.close)
            stack.push_async_callback(self._health.close)
            await self._health.start()
            stack.callback(self._timers.close)
            stack.push_async_callback(self._links.close)
            stack.push_async_callback(self.loads.close)
            if self._caches is not None:
                stack.push_async_callback(self._caches.close)
            stack.push_async_callback(self.watch.close)
            await self.watch.start()
            yield

    def unhealthy(self) -> frozenset[Start]:
        """Workers that do not respond to this frontend, or report NOT_SERVING."""
        return self._health.unhealthy()

    def ejected(self) -> frozenset[Start]:
        """Workers whose circuit breakers keep requests away from them."""
        return self._breakers.ejected()

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Pass a new view on to every part, and close the channels to workers that were removed or restarted.

        A restarted worker at the same address gets a new channel: the old one may be in its reconnect back-off.
        """
        starts = {(worker.address, worker.start) for worker in workers}
        self.channels.keep_only({address for address, _ in starts & self._known_starts})
        self._known_starts = starts
        self._links.follow(workers)
        self._health.follow(workers)
        self._breakers.follow(workers)
        for follower in self._followers:
            follower.follow(workers)
        self.routes.follow(workers)
        if self._caches is not None:
            # Before the loads: those of workers that have left end now, and are no sign of silence.
            self._caches.follow(workers)
        self.loads.follow(workers)
        self.execution.notice(workers)
        self._reevaluate()
        if not self.execution.missing.has_route:
            # What the queue kept back for successors that have not come goes to routing, which refuses it.
            asyncio.get_running_loop().call_later(self._no_worker_wait_s, self._reevaluate)

    def _blocks_of(self, leg: leg_pb2.LegRequest) -> PromptBlocks | None:
        """What the index matches of a request; None: no cache is followed."""
        if self.prefixes is None:
            return None
        return PromptBlocks(leg.token_ids, present(leg, "cache_salt", leg.cache_salt))

    def note_load(self, start: Start, load: EngineLoad | None) -> None:
        """Pass on the load of a worker; None: it is unknown."""
        if load is None and self._caches is not None:
            # A worker whose load reports have stopped may have stopped its cache events as well.
            self._caches.silent(start)
        for follower in self._followers:
            follower.note(start, load)
        self._reevaluate()
