"""The view of the registry as a watcher holds it: merges snapshots and deltas, and outlives a registry.

Pure: the clock is given, nothing is awaited. Owns the rule that an answer of another registry process is no proof of
absence: who is missing from it has a while to register there. How messages arrive is `tandem.rpc.watching`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.model.worker import Worker
from tandem.runtime.clock import Clock

CONFIRM_GRACE_S = 10.0
"""Twice the default lease: every live worker has noticed the loss of its registry and come back by then."""


class ViewGap(Exception):
    """A step of the view is missing; only a new snapshot helps."""


@dataclass(frozen=True, slots=True)
class _Entry:
    worker: Worker
    drop_s: float | None = None
    """Unconfirmed: when to give it up. None: the present registry lists it."""


class RegistryView:
    """Workers by id, confirmed by the present registry or remembered from the one before."""

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
        """Workers that a former registry listed and the present one does not, or not yet."""
        return tuple(worker for worker in self.workers() if self._entries[worker.worker_id].drop_s is not None)

    def apply_snapshot(self, registry_id: str, revision: int, workers: Iterable[Worker]) -> None:
        """Take a whole view. Those missing from it stay, unconfirmed, when it is another registry's."""
        if registry_id == self.registry_id:
            kept = {key: entry for key, entry in self._entries.items() if entry.drop_s is not None}
        else:
            drop_s = self._clock() + self._confirm_grace_s
            kept = {key: _Entry(entry.worker, drop_s) for key, entry in self._entries.items()}
        self.registry_id, self.revision, self._entries = registry_id, revision, kept
        self._confirm(tuple(workers))

    def apply_delta(
        self, registry_id: str, revision: int, upserted: Iterable[Worker], removed: Iterable[tuple[str, int]]
    ) -> None:
        """Take one step; `removed` holds worker id and epoch.

        Raises:
            ViewGap: it is not the step after the last one; nothing was changed.
        """
        if registry_id != self.registry_id or revision != self.revision + 1:
            expected = f"{self.registry_id} {self.revision + 1}"
            raise ViewGap(f"expected revision {expected}, got {registry_id} {revision}")
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

    def _confirm(self, workers: tuple[Worker, ...]) -> None:
        """Enter workers; unconfirmed ones at their addresses have been replaced by them."""
        addresses = {worker.address for worker in workers}
        for worker_id, entry in list(self._entries.items()):
            if entry.drop_s is not None and entry.worker.address in addresses:
                del self._entries[worker_id]
        self._entries.update({worker.worker_id: _Entry(worker) for worker in workers})
