"""The view that was seen last, and what another one changes in it.

Pure. Owns the comparison, whose cost grows with the fleet and is therefore paid for each view, never for each request.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.domain.worker import Worker


class KnownView:
    """Workers by id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}

    def replace(self, workers: Iterable[Worker]) -> tuple[list[Worker], list[Worker]]:
        """Take another view. Returns the workers that it takes away and those that it brings; one that has changed is
        among both. Workers are compared by identity: the view keeps the objects of those that did not change.
        """
        known, now = self._by_id, {worker.worker_id: worker for worker in workers}
        removed = [worker for worker_id, worker in known.items() if now.get(worker_id) is not worker]
        added = [worker for worker_id, worker in now.items() if known.get(worker_id) is not worker]
        self._by_id = now
        return removed, added
