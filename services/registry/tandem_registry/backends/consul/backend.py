"""Membership in Consul: one of any number of registry replicas that serve the same view.

Composition: `client` sends requests, `blocking_query` reads, `lease_manager` owns this replica's leases, `reconciler`
writes, `broadcaster` publishes. Owns their tasks and what calls wait for; the rules are in those modules.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable

import tandem
from tandem.clock import Clock, monotonic
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Member
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import Draining, DuplicateWorker, Overloaded, ServiceError, StartError, WorkerNotFound
from tandem_registry.backends.consul.blocking_query import BlockingQuery
from tandem_registry.backends.consul.broadcaster import Broadcaster
from tandem_registry.backends.consul.client import ConsulClient
from tandem_registry.backends.consul.elections import ConsulElections
from tandem_registry.backends.consul.lease_manager import LeaseManager, Orphan
from tandem_registry.backends.consul.reconciler import Reconciler
from tandem_registry.backends.consul.records import Record, Replica, check_fits, service_id
from tandem_registry.backends.consul.settings import ConsulSettings
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Entry
from tandem_registry.backends.consul.transport import is_refusal
from tandem_registry.backends.subscriptions import Known, Subscription, Subscriptions
from tandem_registry.backends.task_ends import TaskEnds
from tandem_registry.elections import LEASES, Leadership
from tandem_registry.leases import Grant
from tandem_registry.view import Origin, StoreLag, View

log = logging.getLogger(__name__)

START_WAIT_S = 5.0
"""Longest wait of the start for Consul. After it the registry stays NOT_SERVING until Consul responds."""
SEEN_TIMEOUT_S = 2.0
"""From a write until the view shows it. Below the client's timeout of 3 s, so that the client gets the reason."""
LEAVE_TIMEOUT_S = 0.8
"""The same for a deregistration, whose client times out after 1 s."""
REGISTRATIONS_MAX = 64
"""In flight: an agent takes a few hundred a second, and a registration that times out is written only to be removed."""
INTERVAL_MIN_S = 1.0
HOLD_S = 2.0
"""Added to a lease's time to live: how long members that disappeared from Consul may take to come back."""
ORPHAN_RETRY_S = 30.0
SWEEP_MAX_S = 1.0


class ConsulBackend:
    """The leases of this replica, and the view of all replicas."""

    def __init__(
        self, settings: ConsulSettings, ttl_s: float, *, checks_tls: bool = False, clock: Clock = monotonic
    ) -> None:
        """Open no connection yet. `checks_tls`: members serve with TLS."""
        self.replica_id = uuid.uuid4().hex
        self.ttl_s = ttl_s
        self._settings = settings
        self._checks_tls = checks_tls
        self._clock = clock
        self._subscriptions = Subscriptions()
        self._broadcaster = Broadcaster(self._subscriptions, time.time())
        self._client: ConsulClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._orphans: dict[tuple[str, str], float] = {}
        self._ends = TaskEnds()
        self._removals: set[asyncio.Task[None]] = set()
        self._held: asyncio.TimerHandle | None = None
        self._latest: tuple[str, ConsulSnapshot] | None = None
        """Registry id and last snapshot of Consul, published or held back."""
        self._problem: ServiceError | None = None
        self._responded = asyncio.Event()
        self._published = asyncio.Event()
        self._own_entry_id = ""
        self._registering_count = 0
        self._is_withdrawn = self._is_closing = False

    @property
    def has_view(self) -> bool:
        """See the port."""
        return self._published.is_set()

    @property
    def origin(self) -> Origin:
        """Whether the view is live now, and since when."""
        return self._broadcaster.origin

    @property
    def watcher_count(self) -> int:
        """Watchers that are subscribed now."""
        return self._subscriptions.count

    @property
    def lag(self) -> StoreLag:
        """How far the view is behind Consul. Valid after `start`."""
        published = self._broadcaster.observed.index
        latest = published if self._latest is None else self._latest[1].index
        return StoreLag(self._clock() - self._query.responded_s, max(0, latest - published))

    async def start(self, address: str) -> None:
        """Watch Consul and announce this registry at `address`.

        Raises:
            ConfigError: a Consul setting is invalid.
            StartError: Consul rejects this registry's token.
        """
        interval_s = max(INTERVAL_MIN_S, self.ttl_s / 2)
        client = self._client = ConsulClient(self._settings, interval_s=interval_s, checks_tls=self._checks_tls)
        self._elections = ConsulElections(client, LEASES * self.ttl_s, self._clock)
        self._reconciler = Reconciler(client, self.replica_id, self._clock)
        self._leases = LeaseManager(
            replica_id=self.replica_id,
            service=self._settings.service,
            ttl_s=self.ttl_s,
            clock=self._clock,
            reconciler=self._reconciler,
            new_lease_id=lambda: uuid.uuid4().hex,
        )
        self._query = BlockingQuery(
            client,
            new_id=lambda: uuid.uuid4().hex,
            on_observed=self._on_observed,
            on_lost=self._on_lost,
            explains=self._leases.explains,
            clock=self._clock,
        )
        await self._reconciler.start()
        self._announce(address)
        self._tasks = [
            asyncio.create_task(self._query.run(), name="consul-follower"),
            asyncio.create_task(self._sweep(), name="lease-sweep"),
        ]
        if not client.has_checks:
            self._tasks.append(asyncio.create_task(self._pass_own_check(interval_s), name="consul-own-check"))
        for task in (*self._tasks, *self._reconciler.tasks):
            self._ends.watch(task)
        await self._wait_responded()

    async def wait_view(self) -> None:
        """See the port."""
        await self._published.wait()

    async def withdraw(self) -> None:
        """Remove this replica's entry, so that others adopt its leases at once. May be called twice."""
        if not self._is_withdrawn and self._client is not None:
            self._is_withdrawn = True
            self._reconciler.want(self._own_entry_id, None)
            if self._problem is not None:
                return
            with contextlib.suppress(TimeoutError, ServiceError):
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await self._reconciler.written(self._own_entry_id)

    async def close(self) -> None:
        """Close all subscriptions with Draining, and reject every later call. May be called twice."""
        self._is_closing = True
        self._subscriptions.end(_draining())
        if self._held is not None:
            self._held.cancel()
        if self._client is None:
            return
        tasks = [*self._tasks, *self._removals]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._reconciler.close()
        await self._client.close()

    async def wait_failed(self) -> str:
        """Return the reason when one of the tasks has failed; never returns otherwise."""
        return await self._ends.wait_first()

    async def register(self, member: Member) -> Grant:
        """Register one incarnation of a member; returns once Consul shows it."""
        check_fits(member)
        self._check_live()
        if self.replica_id not in self._leases.observed.replicas:
            raise ServiceError("Consul does not list this registry, or its health check fails")
        if self._registering_count >= REGISTRATIONS_MAX:
            raise Overloaded(f"too many registrations in flight to Consul: the limit is {REGISTRATIONS_MAX}")
        self._registering_count += 1
        try:
            return await self._register(member)
        finally:
            self._registering_count -= 1

    async def _register(self, member: Member) -> Grant:
        grant, entry_id = self._leases.register(member)
        key = (member.kind, member.member_id)

        def is_seen(entry: Entry | None) -> bool:
            return entry is not None and entry.record.lease_id == grant.lease_id

        try:
            async with asyncio.timeout(SEEN_TIMEOUT_S):
                await self._reconciler.written(entry_id)
                await self._query.wait_for(
                    lambda: is_seen(self._leases.observed.winners.get(key)) or not self._holds(member, grant)
                )
        except (TimeoutError, ServiceError) as problem:
            if self._holds(member, grant):
                self._leases.give_up(grant.lease_id, entry_id)
                raise ServiceError(
                    f"{entry_id} was not registered in Consul within {SEEN_TIMEOUT_S:g} s: {problem}"
                ) from None
        if not self._holds(member, grant):
            raise DuplicateWorker(
                f"{member.kind}_id {member.member_id} was registered at another registry at the same time",
                worker=member.member_id,
                field=f"{member.kind}_id",
                lease_ttl_ms=int(self.ttl_s * 1_000),
            )
        return Grant(grant.lease_id, self._leases.observed.index)

    async def keep_alive(
        self, lease_id: str, state: WorkerState | None, adapters: tuple[Adapter, ...] | None = None
    ) -> None:
        """Renew a lease that any replica has granted."""
        self._check_open()
        try:
            self._leases.keep_alive(lease_id, state, adapters)
        except WorkerNotFound:
            await self._catch_up()
            self._leases.keep_alive(lease_id, state, adapters)

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; returns the first revision that shows it."""
        self._check_open()
        try:
            self._leases.drain(worker_id, epoch)
        except WorkerNotFound:
            await self._catch_up()
            self._leases.drain(worker_id, epoch)

        def is_seen() -> bool:
            entry = self._leases.observed.winners.get((Worker.kind, worker_id))
            member = None if entry is None else entry.record.member
            return not isinstance(member, Worker) or member.state is WorkerState.DRAINING

        return await self._seen(is_seen, SEEN_TIMEOUT_S, f"worker {worker_id} is marked as draining on this registry")

    async def deregister(self, lease_id: str) -> int:
        """Remove a member; returns the first revision without it."""
        self._check_open()
        try:
            member = self._leases.deregister(lease_id)
        except WorkerNotFound:
            await self._catch_up()
            member = self._leases.deregister(lease_id)
        key, epoch = (member.kind, member.member_id), member.epoch

        def is_seen() -> bool:
            entry = self._leases.observed.members.get(key)
            return entry is None or entry.record.member.epoch > epoch

        return await self._seen(
            is_seen, LEAVE_TIMEOUT_S, f"{member.kind} {member.member_id} is deregistered on this registry"
        )

    async def campaign(self, election: str, candidate_id: str, *, resign: bool = False) -> tuple[Leadership, float]:
        """See the port."""
        self._check_live()
        return await self._elections.campaign(election, candidate_id, resign=resign), self._elections.ttl_s

    async def leader(self, election: str) -> Leadership | None:
        """See the port."""
        return await self._elections.leader(election)

    async def view(self) -> View:
        """The current view."""
        self._check_open()
        registry_id = self._broadcaster.registry_id
        assert registry_id is not None
        return self._broadcaster.observed.view(registry_id, self._leases.ages_s())

    async def subscribe(self, known: Known | None = None) -> Subscription:
        """Subscribe to the view."""
        self._check_open()
        # Without an await in between, no change can fall between the snapshot and the first push.
        return self._subscriptions.add(self._broadcaster.snapshot(), known)

    def _announce(self, address: str) -> None:
        replica = Replica(
            replica_id=self.replica_id,
            epoch=int(time.time() * 1_000),
            address=address,
            release=tandem.__version__,
        )
        record = Record(member=replica, owner=self.replica_id)
        self._own_entry_id = service_id(self._settings.service, record)
        self._reconciler.want(self._own_entry_id, record)

    async def _wait_responded(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                await self._responded.wait()
        if self._problem is not None and is_refusal(self._problem):
            raise StartError(str(self._problem))
        if self._broadcaster.registry_id is None:
            if self._problem is None:
                log.warning("not ready: Consul has not responded within %g s; this registry waits for it", START_WAIT_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEEN_TIMEOUT_S):
                await self._query.wait_for(lambda: self.replica_id in self._leases.observed.replicas)

    def _on_observed(self, registry_id: str, observed: ConsulSnapshot) -> None:
        """Process one response of Consul: compare, hold back or publish."""
        if self._problem is not None:
            log.info("Consul is reachable again, at index %d", observed.index)
        self._problem = None
        self._reconciler.resume()
        if registry_id != self._broadcaster.registry_id and (self._latest is None or registry_id != self._latest[0]):
            self._reconciler.rewrite_all(self._own_entry_id)
        if self._is_withdrawn:
            self._leases.observed = observed
        else:
            self._leases.take(observed)
        self._check_own_entry()
        self._latest = (registry_id, observed)
        missing = self._broadcaster.missing(registry_id, observed, self._leases.own_keys())
        if not missing:
            self._publish()
        elif self._held is None:
            log.warning(
                "%d members disappeared from Consul; serving the last known membership for up to %g s while they"
                " re-register",
                len(missing),
                self.ttl_s + HOLD_S,
            )
            self._broadcaster.hold(time.time())
            self._held = asyncio.get_running_loop().call_later(self.ttl_s + HOLD_S, self._publish)
        self._responded.set()

    def _check_own_entry(self) -> None:
        if all(entry.service_id != self._own_entry_id for entry in self._leases.observed.entries):
            self._reconciler.rewrite_missing(self._own_entry_id)

    def _publish(self) -> None:
        """Publish the latest snapshot, at the end of a hold even where members are missing."""
        if self._held is not None:
            self._held.cancel()
            self._held = None
        if self._latest is not None and self._problem is None:
            self._broadcaster.publish(*self._latest, self._leases.reasons, time.time())
            self._leases.forget_reasons()
            self._published.set()

    def _on_lost(self, problem: ServiceError) -> None:
        """Consul is unreachable: stop writing and serve the last known view."""
        if self._problem is None:
            if self.has_view:
                log.warning("Consul is unreachable; serving the last known membership until it responds (%s)", problem)
            else:
                log.warning(
                    "not ready: Consul is unreachable, retrying; this registry knows no membership yet (%s)", problem
                )
        self._problem = problem
        self._reconciler.pause()
        self._broadcaster.lost(time.time())
        self._responded.set()

    async def _sweep(self) -> None:
        """Wake up for each expiry; a new lease is never the next to expire."""
        while True:
            self._leases.sweep(is_live=self._problem is None)
            if self._problem is None and self._broadcaster.registry_id is not None:
                self._check_own_entry()
                self._remove([] if self._is_withdrawn else [*self._leases.adopt(), *self._leases.own_stale_entries()])
            next_s = self._leases.membership.next_expiry_s()
            wait_s = SWEEP_MAX_S if next_s is None else next_s - self._clock()
            await asyncio.sleep(min(SWEEP_MAX_S, self.ttl_s / 2, max(0.01, wait_s)))

    async def _pass_own_check(self, interval_s: float) -> None:
        """Without gRPC checks by the agent, this registry renews its own TTL check."""
        while True:
            await asyncio.sleep(interval_s)
            with contextlib.suppress(ServiceError):
                await self._client_of().pass_ttl_check(self._own_entry_id)

    def _remove(self, orphans: list[Orphan]) -> None:
        now_s = self._clock()
        for orphan in orphans:
            key = (orphan.node, orphan.service_id)
            if now_s - self._orphans.get(key, -ORPHAN_RETRY_S) >= ORPHAN_RETRY_S:
                self._orphans[key] = now_s
                task = asyncio.create_task(self._remove_one(orphan), name="consul-remove-orphan")
                self._removals.add(task)
                task.add_done_callback(self._removals.discard)

    async def _remove_one(self, orphan: Orphan) -> None:
        try:
            if orphan.is_only_one:
                await self._client_of().deregister(orphan.service_id)
            await self._client_of().deregister_elsewhere(orphan.node, orphan.service_id)
        except ServiceError as problem:
            log.info(
                "could not remove %s, an entry of a dead registry; retrying in %g s: %s",
                orphan.service_id,
                ORPHAN_RETRY_S,
                problem,
            )

    async def _seen(self, is_seen: Callable[[], bool], timeout_s: float, done: str) -> int:
        """Wait until Consul shows a change and return that revision. The change is made on this replica in any case,
        and written to Consul as soon as possible; `done` describes it for the error.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._query.wait_for(is_seen)
        except TimeoutError:
            raise ServiceError(f"{done}, but Consul did not show it within {timeout_s:g} s") from None
        return self._leases.observed.index

    async def _catch_up(self) -> None:
        """Read everything Consul has now, before a lease is reported as unknown: another replica may have granted it.

        Raises:
            ServiceError: Consul is unreachable, so the lease may or may not exist.
        """
        if self._is_withdrawn:
            raise _draining()
        self._check_live()
        try:
            async with asyncio.timeout(SEEN_TIMEOUT_S):
                await self._query.catch_up()
        except TimeoutError:
            raise ServiceError(
                f"unknown whether the lease has expired: no response from Consul within {SEEN_TIMEOUT_S:g} s"
            ) from None

    def _holds(self, member: Member, grant: Grant) -> bool:
        held = self._leases.membership.lease_of(member.kind, member.member_id)
        return held is not None and held.lease_id == grant.lease_id

    def _check_live(self) -> None:
        self._check_open()
        if self._problem is not None:
            raise ServiceError(f"Consul is unreachable, only the last known view is served: {self._problem}")

    def _check_open(self) -> None:
        if self._is_closing:
            raise _draining()
        if self._broadcaster.registry_id is None:
            raise ServiceError(f"no view yet, Consul has not responded since the start: {self._problem}")

    def _client_of(self) -> ConsulClient:
        assert self._client is not None
        return self._client


def _draining() -> Draining:
    return Draining("the registry is shutting down")
