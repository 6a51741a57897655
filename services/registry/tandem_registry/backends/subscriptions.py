"""Watchers of a view: each has a bounded queue of changes it has not consumed yet.

Owns the bounds and how a subscription ends. The backend decides what a change contains and when there is one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

from tandem.domain.frontend import Member
from tandem.errors import Overloaded, RevisionAhead, TandemError
from tandem_registry.view import Change, View

log = logging.getLogger(__name__)

WATCHERS_MAX = 1024
PENDING_STEPS_MAX = 256
"""A watcher that is further behind is closed and starts again from a snapshot, which is cheaper than the backlog."""

Known = tuple[str, int]
"""Registry id and revision of the view that a watcher already has."""


class Subscription:
    """One watcher's queue."""

    def __init__(self, snapshot: View, pending_max: int, on_close: Callable[[Subscription], None]) -> None:
        self.snapshot = snapshot
        self._pending: deque[Change | View] = deque()
        self._pending_max = pending_max
        self._on_close = on_close
        self._ending: TandemError | None = None
        self._ready = asyncio.Event()

    @property
    def pending_count(self) -> int:
        """Changes the watcher has not consumed yet."""
        return len(self._pending)

    def push(self, step: Change | View) -> None:
        """Queue a change; closes the subscription when its queue is full."""
        if len(self._pending) >= self._pending_max:
            self._pending.clear()
            self.end(Overloaded(f"watcher fell more than {self._pending_max} changes behind: watch again"))
            return
        self._pending.append(step)
        self._ready.set()

    def end(self, error: TandemError) -> None:
        """Close it: the watcher still gets what is queued, then `error` is raised in it."""
        self._ending = self._ending or error
        self._ready.set()
        self.close()

    async def steps(self) -> AsyncIterator[Change | View]:
        """All changes after the snapshot; a whole View starts a new registry id, with its own revisions."""
        while True:
            while self._pending:
                yield self._pending.popleft()
            if self._ending is not None:
                raise self._ending
            self._ready.clear()
            await self._ready.wait()

    def close(self) -> None:
        """Remove the watcher. May be called twice."""
        self._on_close(self)


class Subscriptions:
    """All watchers of one view."""

    def __init__(self, pending_max: int = PENDING_STEPS_MAX) -> None:
        self._pending_max = pending_max
        self._open: dict[Subscription, None] = {}

    @property
    def count(self) -> int:
        """Watchers that are subscribed now."""
        return len(self._open)

    def add(self, snapshot: View, known: Known | None) -> Subscription:
        """Subscribe from `snapshot`. The caller must not await between taking the snapshot and this call.

        Raises:
            Overloaded: there are too many watchers.
            RevisionAhead: the watcher's view is newer than this one.
        """
        if len(self._open) >= WATCHERS_MAX:
            raise Overloaded(f"too many watchers: this registry accepts at most {WATCHERS_MAX}")
        if known is not None and known[0] == snapshot.registry_id and known[1] > snapshot.revision:
            raise RevisionAhead(
                f"known_revision {known[1]} is ahead of this registry's revision {snapshot.revision}",
                field="known_revision",
                revision=snapshot.revision,
            )
        subscription = Subscription(snapshot, self._pending_max, self._remove)
        self._open[subscription] = None
        return subscription

    def publish(self, step: Change | View) -> None:
        """Queue one change for every watcher, and log it."""
        _log_step(step)
        for subscription in list(self._open):
            subscription.push(step)

    def end(self, error: TandemError) -> None:
        """Close all of them with `error`."""
        for subscription in list(self._open):
            subscription.end(error)

    def _remove(self, subscription: Subscription) -> None:
        self._open.pop(subscription, None)


def _log_step(step: Change | View) -> None:
    if isinstance(step, View):
        log.info("new registry id %s, at revision %d: %d workers", step.registry_id, step.revision, len(step.workers))
        return
    for member in step.upserted:
        described = (*_start(member), member.address, member.state.value)
        log.info("revision %d: %s %s (epoch %d, at %s) is %s", step.revision, *described)
    for removed in step.removed:
        log.info(
            "revision %d: %s %s (epoch %d) removed: %s", step.revision, *_start(removed.member), removed.reason.value
        )


def _start(member: Member) -> tuple[str, str, int]:
    return member.kind, member.member_id, member.epoch
