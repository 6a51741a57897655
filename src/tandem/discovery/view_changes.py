"""Difference between two views of the workers.

Pure. Owns the comparison. Its cost grows with the number of workers, so it runs once per view, never per request.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.domain.worker import Worker


class KnownView:
    """The last view, by worker id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}

    def replace(self, workers: Iterable[Worker]) -> tuple[list[Worker], list[Worker]]:
        """Replace the view. Returns the removed and the added workers; a changed worker is in both lists. Workers are
        compared by identity, which is cheap: a view keeps the objects of unchanged workers.
        """
        known, now = self._by_id, {worker.worker_id: worker for worker in workers}
        removed = [worker for worker_id, worker in known.items() if now.get(worker_id) is not worker]
        added = [worker for worker_id, worker in now.items() if known.get(worker_id) is not worker]
        self._by_id = now
        return removed, added
