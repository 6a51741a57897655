"""What the registry asks of a place that keeps membership.

Owns the shape only. Its errors are those of `tandem_registry.membership`, and Draining once it is closing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tandem.model.worker import Worker, WorkerState
from tandem_registry.membership import Change, Grant, View


class Subscription(Protocol):
    """One watcher's way into the view: where it begins, and every change from there on without a gap."""

    snapshot: View
    """The view it begins with."""

    def changes(self) -> AsyncIterator[Change]:
        """All changes after the snapshot.

        Raises:
            Overloaded: the watcher took too long; it must begin again from a new snapshot.
            Draining: the registry is going away.
        """
        ...

    def close(self) -> None:
        """The watcher has left. May be called twice."""
        ...


class Backend(Protocol):
    """Keeps leases and tells of changes."""

    registry_id: str
    """Names whoever counts the revisions."""
    ttl_s: float
    """Time a lease lives without a sign of life."""

    async def start(self) -> None:
        """Begin to watch over leases."""
        ...

    async def close(self) -> None:
        """End all subscriptions with Draining and refuse everything from now on. May be called twice."""
        ...

    async def wait_failed(self) -> str:
        """Return one sentence when it can no longer watch over leases; never returns otherwise."""
        ...

    async def register(self, worker: Worker) -> Grant:
        """Enter one start of a worker."""
        ...

    async def keep_alive(self, lease_id: str, state: WorkerState | None) -> None:
        """Hear a sign of life."""
        ...

    async def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining; the revision that first shows it."""
        ...

    async def deregister(self, lease_id: str) -> int:
        """Take a worker out; the revision that first lacks it."""
        ...

    async def view(self) -> View:
        """The view at this moment."""
        ...

    async def subscribe(self) -> Subscription:
        """Begin to watch.

        Raises:
            Overloaded: there are too many watchers.
        """
        ...
