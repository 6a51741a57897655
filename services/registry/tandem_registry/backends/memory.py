"""Membership in the memory of this process: one replica, nothing survives a restart (workers register again).

Owns the asyncio side of membership: waking up for the next expiry, and handing changes to watchers through bounded
queues. Every rule about leases and epochs is in `tandem_registry.membership`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable

from tandem.errors import Draining, Overloaded, TandemError
from tandem.model.worker import Worker, WorkerState
from tandem.runtime.clock import Clock, monotonic
from tandem_registry.membership import Change, Grant, Membership, View

log = logging.getLogger(__name__)

WATCHERS_MAX = 1024
PENDING_CHANGES_MAX = 256
"""A watcher that is further behind begins again from a snapshot, which is cheaper than the changes it missed."""


def random_id() -> str:
    """An id nobody else draws."""
    return uuid.uuid4().hex


class MemorySubscription:
    """One watcher's queue."""

    def __init__(self, snapshot: View, pending_max: int, on_close: Callable[[MemorySubscription], None]) -> None:
        self.snapshot = snapshot
        self._pending: deque[Change] = deque()
        self._pending_max = pending_max
        self._on_close = on_close
        self._ending: TandemError | None = None
        self._ready = asyncio.Event()

    @property
    def pending_count(self) -> int:
        """Changes the watcher has not taken yet."""
        return len(self._pending)

    def push(self, change: Change) -> None:
        """Queue a change; ends the subscription when its queue is full."""
        if len(self._pending) >= self._pending_max:
            self._pending.clear()
            self.end(Overloaded(f"watcher fell more than {self._pending_max} changes behind: watch again"))
            return
        self._pending.append(change)
        self._ready.set()

    def end(self, error: TandemError) -> None:
        """Let the watcher take what is queued, then raise in it."""
        self._ending = self._ending or error
        self._ready.set()
        self.close()

    async def changes(self) -> AsyncIterator[Change]:
        """All changes after the snapshot."""
        while True:
            while self._pending:
                yield self._pending.popleft()
            if self._ending is not None:
                raise self._ending
            self._ready.clear()
            await self._ready.wait()

    def close(self) -> None:
        """The watcher has left. May be called twice."""
        self._on_close(self)


class MemoryBackend:
    """Leases in a dictionary, one task that expires them."""

    def __init__(
        self, ttl_s: float, *, clock: Clock = monotonic, pending_changes_max: int = PENDING_CHANGES_MAX
    ) -> None:
        self.registry_id = random_id()
        self.ttl_s = ttl_s
        self._clock = clock
        self._pending_changes_max = pending_changes_max
        self._membership = Membership(ttl_s=ttl_s, clock=clock, new_lease_id=random_id, on_change=self._publish)
        self._subscriptions: dict[MemorySubscription, None] = {}
        self._first_lease = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def watcher_count(self) -> int:
        """Watchers that are subscribed now."""
        return len(self._subscriptions)

    async def start(self) -> None:
        """Begin to watch over leases."""
        self._sweeper = asyncio.create_task(self._sweep(), name="lease-sweep")

    async def close(self) -> None:
        """End all subscriptions with Draining and refuse everything from now on. May be called twice."""
        self._is_closing = True
        for subscription in list(self._subscriptions):
            subscription.end(_draining())
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})

    async def wait_failed(self) -> str:
        """Return one sentence when the sweep has died; never returns otherwise."""
        assert self._sweeper is not None, "wait_failed() before start()"
        await asyncio.wait({self._sweeper})
        problem = None if self._sweeper.cancelled() else self._sweeper.exception()
        return f"leases are no longer watched: {problem!r}"

    async def register(self, worker: Worker) -> Grant:
        """Enter one start of a worker."""
        grant = self._open().register(worker)
        self._first_lease.set()
        return grant

    async def keep_alive(self, lease_id: str, state: WorkerState | None) -> None:
        """Hear a sign of life."""
        self._open().keep_alive(lease_id, state)

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; the revision that first shows it."""
        return self._open().drain(worker_id, epoch)

    async def deregister(self, lease_id: str) -> int:
        """Take a worker out; the revision that first lacks it."""
        return self._open().deregister(lease_id)

    async def view(self) -> View:
        """The view at this moment."""
        return self._open().view()

    async def subscribe(self) -> MemorySubscription:
        """Begin to watch."""
        membership = self._open()
        if len(self._subscriptions) >= WATCHERS_MAX:
            raise Overloaded(f"{WATCHERS_MAX} watchers are the most this registry takes")
        # Without an await in between, no change can fall between the snapshot and the first push.
        snapshot = membership.view()
        subscription = MemorySubscription(snapshot, self._pending_changes_max, self._unsubscribe)
        self._subscriptions[subscription] = None
        return subscription

    async def _sweep(self) -> None:
        """Wake up for each expiry, never in between: all leases live equally long, so a new one is never the first."""
        while True:
            self._membership.expire()
            next_s = self._membership.next_expiry_s()
            if next_s is None:
                self._first_lease.clear()
                await self._first_lease.wait()
            else:
                await asyncio.sleep(max(0.0, next_s - self._clock()))

    def _publish(self, change: Change) -> None:
        for worker in change.upserted:
            log.info("revision %d: %s of epoch %d at %s: %s", change.revision, *_described(worker))
        for removed in change.removed:
            log.info(
                "revision %d: %s of epoch %d left: %s",
                change.revision,
                removed.worker.worker_id,
                removed.worker.epoch,
                removed.reason.value,
            )
        for subscription in list(self._subscriptions):
            subscription.push(change)

    def _open(self) -> Membership:
        if self._is_closing:
            raise _draining()
        return self._membership

    def _unsubscribe(self, subscription: MemorySubscription) -> None:
        self._subscriptions.pop(subscription, None)


def _described(worker: Worker) -> tuple[str, int, str, str]:
    return worker.worker_id, worker.epoch, worker.address, worker.state.value


def _draining() -> Draining:
    return Draining("the registry is going away")
