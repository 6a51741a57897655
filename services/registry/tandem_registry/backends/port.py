"""The interface of a membership store.

Owns the protocol only. Its errors are those of `tandem_registry.leases`, ServiceError while the store is unreachable,
and Draining once the backend is closing.
"""

from __future__ import annotations

from typing import Protocol

from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Member
from tandem.domain.worker import WorkerState
from tandem_registry.backends.subscriptions import Known, Subscription
from tandem_registry.elections import Leadership
from tandem_registry.leases import Grant
from tandem_registry.view import Origin, StoreLag, View


class Backend(Protocol):
    """Stores leases and publishes changes."""

    replica_id: str
    """Id of this process among the registries that share one store."""
    ttl_s: float
    """Time to live of a lease after its last keep-alive."""

    @property
    def watcher_count(self) -> int:
        """Watchers that are subscribed now."""
        ...

    @property
    def lag(self) -> StoreLag | None:
        """How far the view is behind the store; None where this process is the store."""
        ...

    @property
    def has_view(self) -> bool:
        """Whether there is a view to serve, live or last known."""
        ...

    @property
    def origin(self) -> Origin:
        """Whether the view is live now, and since when."""
        ...

    async def start(self, address: str) -> None:
        """Start to expire leases, and announce this registry, which serves at host:port, to discovery.

        Raises:
            StartError: the store rejects this registry.
        """
        ...

    async def wait_view(self) -> None:
        """Return once there has been a view; waits only while the store has not responded since the start."""
        ...

    async def withdraw(self) -> None:
        """Remove this registry from discovery. May be called twice."""
        ...

    async def close(self) -> None:
        """Close all subscriptions with Draining, and reject every later call. May be called twice."""
        ...

    async def wait_failed(self) -> str:
        """Return the reason when leases can no longer be expired; never returns otherwise."""
        ...

    async def register(self, member: Member) -> Grant:
        """Register one incarnation of a member.

        Raises:
            InvalidRequest: the store cannot hold one of its fields.
        """
        ...

    async def keep_alive(
        self, lease_id: str, state: WorkerState | None, adapters: tuple[Adapter, ...] | None = None
    ) -> None:
        """Renew a lease."""
        ...

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; returns the first revision that shows it."""
        ...

    async def deregister(self, lease_id: str) -> int:
        """Remove a member; returns the first revision without it."""
        ...

    async def campaign(self, election: str, candidate_id: str, *, resign: bool = False) -> tuple[Leadership, float]:
        """Ask to lead an election, or give it up. Returns who leads now, and for how many seconds without asking again.

        Raises:
            ServiceError: the store is unreachable.
        """
        ...

    async def leader(self, election: str) -> Leadership | None:
        """Who leads an election; None: no candidate."""
        ...

    async def view(self) -> View:
        """The current view."""
        ...

    async def subscribe(self, known: Known | None = None) -> Subscription:
        """Subscribe to the view; `known` is the view that the watcher already has.

        Raises:
            Overloaded: there are too many watchers.
            RevisionAhead: `known` is ahead of this replica.
        """
        ...
