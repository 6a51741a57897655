"""A watcher's view of the registry's members: merges snapshots, deltas and lists, also of several registries.

Pure: the clock is passed in, nothing is awaited. Owns the rule of what does not prove absence: a message of another
registry process, or one older than the view. A member that is missing from such a message stays, unconfirmed, for a
grace period. `tandem.discovery.watches` receives the messages.
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
"""Twice the default lease: every live worker has noticed the loss of its registry and registered again by then."""


class ViewGap(Exception):
    """A delta is missing, so the stream must be restarted from a new snapshot."""


@dataclass(frozen=True, slots=True)
class _Entry(Generic[M]):
    member: M
    drop_s: float | None = None
    """Unconfirmed: when to remove it, on the view's clock. None: the current registry lists it."""

    def unconfirmed(self, drop_s: float) -> _Entry[M]:
        """The same member, unconfirmed; keeps its time if it was unconfirmed before."""
        return _Entry(self.member, drop_s) if self.drop_s is None else self


class View(Generic[M]):
    """Members by id: confirmed by the current registry, or kept from an earlier one."""

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
        """Members that an earlier registry listed and the current one does not list, or not yet."""
        return tuple(member for member in self.members() if self._entries[self._id_of(member)].drop_s is not None)

    def drop_overdue(self) -> bool:
        """Remove unconfirmed members whose grace period is over. Returns whether there were any."""
        now_s = self._clock()
        overdue = [key for key, entry in self._entries.items() if entry.drop_s is not None and entry.drop_s <= now_s]
        for member_id in overdue:
            del self._entries[member_id]
        return bool(overdue)

    def next_drop_s(self) -> float | None:
        """When to call `drop_overdue`; None while all members are confirmed."""
        return min((entry.drop_s for entry in self._entries.values() if entry.drop_s is not None), default=None)

    def _knows_newer(self, member: M) -> bool:
        entry = self._entries.get(self._id_of(member))
        return entry is not None and entry.member.epoch > member.epoch


class WorkerView(View[Worker]):
    """Workers: whole snapshots, and deltas from one revision to the next."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        super().__init__(lambda worker: worker.worker_id, clock, confirm_grace_s)

    def apply_snapshot(self, registry_id: str, revision: int, workers: Iterable[Worker]) -> None:
        """Apply a whole view. Workers missing from it stay, unconfirmed, if it is another registry's or an older one.

        An older one, from a replica that lags, does not bring back previous incarnations of known workers either.
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
        """Apply the change from one revision to the next; `removed` contains worker ids and epochs.

        Raises:
            ViewGap: it does not follow the view's revision; nothing was changed.
        """
        if registry_id != self.registry_id or previous_revision != self.revision or revision <= previous_revision:
            step = f"{registry_id} {previous_revision} to {revision}"
            raise ViewGap(f"missing changes: expected a delta from {self.registry_id} {self.revision}, got {step}")
        self.revision = revision
        for worker_id, epoch in removed:
            entry = self._entries.get(worker_id)
            if entry is not None and entry.member.epoch <= epoch:
                del self._entries[worker_id]
        self._confirm(tuple(upserted))

    def _confirm(self, workers: tuple[Worker, ...]) -> None:
        """Add workers as confirmed; they replace unconfirmed ones at the same addresses."""
        addresses = {worker.address for worker in workers}
        for worker_id, entry in list(self._entries.items()):
            if entry.drop_s is not None and entry.member.address in addresses:
                del self._entries[worker_id]
        self._entries.update({worker.worker_id: _Entry(worker) for worker in workers})


class FrontendView(View[Frontend]):
    """Frontends: whole lists. The last one is never removed: health checks decide whether it is dead."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        super().__init__(lambda frontend: frontend.frontend_id, clock, confirm_grace_s)

    def apply(self, registry_id: str, revision: int, frontends: Iterable[Frontend]) -> bool:
        """Apply a whole list. Returns False for an empty list after a non-empty one, which is ignored.

        A list proves an absence only if it follows the previous one of the same registry.
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
