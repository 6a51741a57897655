"""What the registry asks of a place that keeps membership.

Owns the shape only. Its errors are those of `tandem_registry.leases`, ServiceError while the place cannot be
reached, and Draining once it is closing.
"""

from __future__ import annotations

from typing import Protocol

from tandem.domain.frontend import Member
from tandem.domain.worker import WorkerState
from tandem_registry.backends.subscriptions import Known, Subscription
from tandem_registry.leases import Grant
from tandem_registry.view import Followed, Origin, View


class Backend(Protocol):
    """Keeps leases and tells of changes."""

    replica_id: str
    """Names this process among the registries over one place."""
    ttl_s: float
    """Time a lease lives without a sign of life."""

    @property
    def watcher_count(self) -> int:
        """Watchers that are subscribed now."""
        ...

    @property
    def followed(self) -> Followed | None:
        """How far behind the place the view is; None where the place is this process itself."""
        ...

    @property
    def has_view(self) -> bool:
        """Whether there is a view to tell, live or last known."""
        ...

    @property
    def origin(self) -> Origin:
        """Where the view comes from at this moment."""
        ...

    async def start(self, address: str) -> None:
        """Begin to watch over leases, and let others find this registry, which serves at host:port.

        Raises:
            StartError: the place does not take this registry.
        """
        ...

    async def wait_view(self) -> None:
        """Return as soon as there has been a view: at once, unless the place has not answered since the start."""
        ...

    async def withdraw(self) -> None:
        """This registry goes: let nobody find it any more. May be called twice."""
        ...

    async def close(self) -> None:
        """End all subscriptions with Draining and refuse everything from now on. May be called twice."""
        ...

    async def wait_failed(self) -> str:
        """Return one sentence when it can no longer watch over leases; never returns otherwise."""
        ...

    async def register(self, member: Member) -> Grant:
        """Enter one start of a member.

        Raises:
            InvalidRequest: the place cannot keep a field of it.
        """
        ...

    async def keep_alive(self, lease_id: str, state: WorkerState | None) -> None:
        """Hear a sign of life."""
        ...

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; the revision that first shows it."""
        ...

    async def deregister(self, lease_id: str) -> int:
        """Take a member out; the revision that first lacks it."""
        ...

    async def view(self) -> View:
        """The view at this moment."""
        ...

    async def subscribe(self, known: Known | None = None) -> Subscription:
        """Begin to watch, as one who holds the view `known`.

        Raises:
            Overloaded: there are too many watchers.
            RevisionAhead: `known` is ahead of this replica.
        """
        ...
