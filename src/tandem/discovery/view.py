"""The registry's members as a watcher holds them: merges snapshots, deltas and lists, and outlives a registry.

Pure: the clock is given, nothing is awaited. Owns the rule of what is no proof of absence: an answer of another
registry, or one that is older than what is known. A member that is missing from such an answer stays, unconfirmed, for
a grace period. How messages arrive is `tandem.discovery.watches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tandem.clock import Clock
from tandem.domain.frontend import Frontend
from tandem.domain.worker import Worker

M = TypeVar("M", Worker, Frontend)

CONFIRM_GRACE_S = 10.0
"""Twice the default lease: every live worker has noticed the loss of its registry and come back by then."""


class ViewGap(Exception):
    """A step of the view is missing; only a new snapshot helps."""


@dataclass(frozen=True, slots=True)
class _Entry(Generic[M]):
    member: M
    drop_s: float | None = None
    """Unconfirmed: when to remove it, on the view's clock. None: the present registry lists it."""

    def unconfirmed(self, drop_s: float) -> _Entry[M]:
        """The same, unconfirmed; one that is so already gets no new time."""
        return _Entry(self.member, drop_s) if self.drop_s is None else self


class View(Generic[M]):
    """Members by id, confirmed by the present registry or remembered from what was known before."""

    def __init__(self, id_of: Callable[[M], str], clock: Clock, confirm_grace_s: float) -> None:
        self.registry_id: str | None = None
        self.revision = 0
        self._id_of: Callable[[M], str] = id_of
        self._clock = clock
        self._confirm_grace_s = confirm_grace_s
        self._entries: dict[str, _Entry[M]] = {}

    def members(self) -> tuple[M, ...]:
        """All members, confirmed or not, ordered by id."""
        return tuple(self._entries[member_id].member for member_id in sorted(self._entries))

    def unconfirmed(self) -> tuple[M, ...]:
        """Members that were listed once and that the present registry does not list, or not yet."""
        return tuple(member for member in self.members() if self._entries[self._id_of(member)].drop_s is not None)

    def drop_overdue(self) -> bool:
        """Remove the unconfirmed whose grace period is over. Returns whether there were any."""
        now_s = self._clock()
        overdue = [key for key, entry in self._entries.items() if entry.drop_s is not None and entry.drop_s <= now_s]
        for member_id in overdue:
            del self._entries[member_id]
        return bool(overdue)

    def next_drop_s(self) -> float | None:
        """When to call `drop_overdue`; None while every member is confirmed."""
        return min((entry.drop_s for entry in self._entries.values() if entry.drop_s is not None), default=None)

    def _knows_newer(self, member: M) -> bool:
        entry = self._entries.get(self._id_of(member))
        return entry is not None and entry.member.epoch > member.epoch


class WorkerView(View[Worker]):
    """Workers: whole snapshots, and deltas from one revision to the next."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        super().__init__(lambda worker: worker.worker_id, clock, confirm_grace_s)

    def apply_snapshot(self, registry_id: str, revision: int, workers: Iterable[Worker]) -> None:
        """Take a whole view. Those missing from it stay, unconfirmed, when it is another registry's or an older one.

        An older one, as a replica has that lags behind, does not bring former starts of known workers back either.
        """
        listed = tuple(workers)
        drop_s = self._clock() + self._confirm_grace_s
        if registry_id != self.registry_id:
            kept = {key: _Entry(entry.member, drop_s) for key, entry in self._entries.items()}
        elif revision < self.revision:
            kept = {key: entry.unconfirmed(drop_s) for key, entry in self._entries.items()}
            listed = tuple(worker for worker in listed if not self._knows_newer(worker))
        else:
            kept = {key: entry for key, entry in self._entries.items() if entry.drop_s is not None}
        self.registry_id, self.revision, self._entries = registry_id, revision, kept
        self._confirm(listed)

    def apply_delta(
        self,
        registry_id: str,
        previous_revision: int,
        revision: int,
        upserted: Iterable[Worker],
        removed: Iterable[tuple[str, int]],
    ) -> None:
        """Take one step from one revision to the next; `removed` holds worker id and epoch.

        Raises:
            ViewGap: it does not follow what is known; nothing was changed.
        """
        if registry_id != self.registry_id or previous_revision != self.revision or revision <= previous_revision:
            step = f"{registry_id} {previous_revision} to {revision}"
            raise ViewGap(f"expected a step from {self.registry_id} {self.revision}, got {step}")
        self.revision = revision
        for worker_id, epoch in removed:
            entry = self._entries.get(worker_id)
            if entry is not None and entry.member.epoch <= epoch:
                del self._entries[worker_id]
        self._confirm(tuple(upserted))

    def _confirm(self, workers: tuple[Worker, ...]) -> None:
        """Enter workers; unconfirmed ones at their addresses have been replaced by them."""
        addresses = {worker.address for worker in workers}
        for worker_id, entry in list(self._entries.items()):
            if entry.drop_s is not None and entry.member.address in addresses:
                del self._entries[worker_id]
        self._entries.update({worker.worker_id: _Entry(worker) for worker in workers})


class FrontendView(View[Frontend]):
    """Frontends: whole lists. The last one is never removed: whether it is dead is for health checks to say."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        super().__init__(lambda frontend: frontend.frontend_id, clock, confirm_grace_s)

    def apply(self, registry_id: str, revision: int, frontends: Iterable[Frontend]) -> bool:
        """Take a whole list. Returns False for an empty one after a full one, which is ignored.

        A list proves an absence only when it follows the one before at the same registry.
        """
        listed = {frontend.frontend_id: frontend for frontend in frontends}
        if not listed and self._entries:
            return False
        is_older = registry_id == self.registry_id and revision < self.revision
        proves_absence = registry_id == self.registry_id and not is_older
        drop_s = self._clock() + self._confirm_grace_s
        addresses = {frontend.address for frontend in listed.values()}
        entries = {frontend_id: _Entry(frontend) for frontend_id, frontend in listed.items()}
        for frontend_id, known in self._entries.items():
            if frontend_id in listed:
                if is_older and self._knows_newer(listed[frontend_id]):
                    entries[frontend_id] = known.unconfirmed(drop_s)
            elif known.member.address not in addresses and not (proves_absence and known.drop_s is None):
                entries[frontend_id] = known.unconfirmed(drop_s)
        self.registry_id, self.revision, self._entries = registry_id, revision, entries
        return True
