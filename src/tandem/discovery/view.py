"""The view of the registry as a watcher holds it: merges snapshots and deltas, and outlives a registry.

Pure: the clock is given, nothing is awaited. Owns the rule of what is no proof of absence: an answer of another
registry, or one that is older than what is known. Who is missing from it has a while to come back. How messages arrive
is `tandem.discovery.watches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.clock import Clock
from tandem.domain.worker import Worker

CONFIRM_GRACE_S = 10.0
"""Twice the default lease: every live worker has noticed the loss of its registry and come back by then."""


class ViewGap(Exception):
    """A step of the view is missing; only a new snapshot helps."""


@dataclass(frozen=True, slots=True)
class _Entry:
    worker: Worker
    drop_s: float | None = None
    """Unconfirmed: when to give it up. None: the present registry lists it."""

    def unconfirmed(self, drop_s: float) -> _Entry:
        """The same, unconfirmed; who is so already gets no new time."""
        return _Entry(self.worker, drop_s) if self.drop_s is None else self


class RegistryView:
    """Workers by id, confirmed by the present registry or remembered from what was known before."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        self.registry_id: str | None = None
        self.revision = 0
        self._clock = clock
        self._confirm_grace_s = confirm_grace_s
        self._entries: dict[str, _Entry] = {}

    def workers(self) -> tuple[Worker, ...]:
        """All workers, confirmed or not, ordered by id."""
        return tuple(self._entries[worker_id].worker for worker_id in sorted(self._entries))

    def unconfirmed(self) -> tuple[Worker, ...]:
        """Workers that were listed once and that the present registry does not list, or not yet."""
        return tuple(worker for worker in self.workers() if self._entries[worker.worker_id].drop_s is not None)

    def apply_snapshot(self, registry_id: str, revision: int, workers: Iterable[Worker]) -> None:
        """Take a whole view. Those missing from it stay, unconfirmed, when it is another registry's or an older one.

        An older one, as a replica has that lags behind, does not bring former starts of known workers back either.
        """
        listed = tuple(workers)
        drop_s = self._clock() + self._confirm_grace_s
        if registry_id != self.registry_id:
            kept = {key: _Entry(entry.worker, drop_s) for key, entry in self._entries.items()}
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
            if entry is not None and entry.worker.epoch <= epoch:
                del self._entries[worker_id]
        self._confirm(tuple(upserted))

    def drop_overdue(self) -> bool:
        """Give up the unconfirmed whose time is over. Returns whether there were any."""
        now_s = self._clock()
        overdue = [key for key, entry in self._entries.items() if entry.drop_s is not None and entry.drop_s <= now_s]
        for worker_id in overdue:
            del self._entries[worker_id]
        return bool(overdue)

    def next_drop_s(self) -> float | None:
        """When to call `drop_overdue`; None while everybody is confirmed."""
        return min((entry.drop_s for entry in self._entries.values() if entry.drop_s is not None), default=None)

    def _knows_newer(self, worker: Worker) -> bool:
        entry = self._entries.get(worker.worker_id)
        return entry is not None and entry.worker.epoch > worker.epoch

    def _confirm(self, workers: tuple[Worker, ...]) -> None:
        """Enter workers; unconfirmed ones at their addresses have been replaced by them."""
        addresses = {worker.address for worker in workers}
        for worker_id, entry in list(self._entries.items()):
            if entry.drop_s is not None and entry.worker.address in addresses:
                del self._entries[worker_id]
        self._entries.update({worker.worker_id: _Entry(worker) for worker in workers})
