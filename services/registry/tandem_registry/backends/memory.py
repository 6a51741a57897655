"""Membership in the memory of this process: one replica, nothing survives a restart (workers register again).

Owns the asyncio side of membership: the timer for the next expiry, and the publication of changes to watchers. Every
rule about leases and epochs is in `tandem_registry.leases`.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from tandem.clock import Clock, monotonic
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Member
from tandem.domain.worker import WorkerState
from tandem.errors import Draining
from tandem_registry.backends.subscriptions import PENDING_STEPS_MAX, Known, Subscription, Subscriptions
from tandem_registry.backends.task_ends import TaskEnds
from tandem_registry.elections import LEASES, Elections, Leadership
from tandem_registry.leases import Grant, Membership
from tandem_registry.view import Origin, View


def random_id() -> str:
    """A unique random id."""
    return uuid.uuid4().hex


class MemoryBackend:
    """Leases in a dictionary, and one task that expires them."""

    has_view = True

    def __init__(self, ttl_s: float, *, clock: Clock = monotonic, pending_steps_max: int = PENDING_STEPS_MAX) -> None:
        self.replica_id = random_id()
        self.ttl_s = ttl_s
        self.origin = Origin(is_live=True, since_s=time.time())
        self._clock = clock
        self._subscriptions = Subscriptions(pending_steps_max)
        self._membership = Membership(
            owner=self.replica_id,
            ttl_s=ttl_s,
            clock=clock,
            new_lease_id=random_id,
            on_change=self._subscriptions.publish,
        )
        self._elections = Elections(LEASES * ttl_s, clock, time.time_ns() // 10**6)
        self._first_lease = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._ends = TaskEnds()
        self._is_closing = False

    @property
    def watcher_count(self) -> int:
        """Watchers that are subscribed now."""
        return self._subscriptions.count

    @property
    def lag(self) -> None:
        """Always None: this process is the store."""
        return None

    async def start(self, address: str) -> None:
        """Start to expire leases. This backend has no discovery to announce `address` to."""
        self._sweeper = self._ends.watch(asyncio.create_task(self._sweep(), name="lease-sweep"))

    async def withdraw(self) -> None:
        """Do nothing: this backend has no discovery to withdraw from."""

    async def wait_view(self) -> None:
        """Return at once: there is a view from the start."""

    async def close(self) -> None:
        """Close all subscriptions with Draining, and reject every later call. May be called twice."""
        self._is_closing = True
        self._subscriptions.end(_draining())
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})

    async def wait_failed(self) -> str:
        """Return the reason when the sweep task has failed; never returns otherwise."""
        return f"leases no longer expire, {await self._ends.wait_first()}"

    async def register(self, member: Member) -> Grant:
        """Register one incarnation of a member."""
        grant = self._open().register(member)
        self._first_lease.set()
        return grant

    async def keep_alive(
        self, lease_id: str, state: WorkerState | None, adapters: tuple[Adapter, ...] | None = None
    ) -> None:
        """Renew a lease."""
        self._open().keep_alive(lease_id, state, adapters)

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; returns the first revision that shows it."""
        return self._open().drain(worker_id, epoch)

    async def deregister(self, lease_id: str) -> int:
        """Remove a member; returns the first revision without it."""
        return self._open().deregister(lease_id)

    async def campaign(self, election: str, candidate_id: str, *, resign: bool = False) -> tuple[Leadership, float]:
        """See the port."""
        self._open()
        return self._elections.campaign(election, candidate_id, resign=resign), self._elections.ttl_s

    async def leader(self, election: str) -> Leadership | None:
        """See the port."""
        return self._elections.leader(election)

    async def view(self) -> View:
        """The current view."""
        return self._open().view()

    async def subscribe(self, known: Known | None = None) -> Subscription:
        """Subscribe to the view."""
        # Without an await in between, no change can fall between the snapshot and the first push.
        return self._subscriptions.add(self._open().view(), known)

    async def _sweep(self) -> None:
        """Wake up for each expiry only: all leases have the same time to live, so a new one is never the next to
        expire.
        """
        while True:
            self._membership.expire()
            next_s = self._membership.next_expiry_s()
            if next_s is None:
                self._first_lease.clear()
                await self._first_lease.wait()
            else:
                await asyncio.sleep(max(0.0, next_s - self._clock()))

    def _open(self) -> Membership:
        if self._is_closing:
            raise _draining()
        return self._membership


def _draining() -> Draining:
    return Draining("the registry is shutting down")
