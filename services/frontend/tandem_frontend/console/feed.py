"""The fleet as a stream of JSON texts: all of it first, then each second what has changed.

Owns the snapshot, which all viewers share and which is computed only while there is one. Reads what this frontend knows
of the workers anyway; of other frontends it asks the statistics. `rows.py` has the fields.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.domain.worker import Start, Worker
from tandem.observability.fleet_sample import UNREACHABLE, FrontendSample, Sample, WorkerSample, failures_by_worker
from tandem_frontend.console.rows import frontend_row, totals, worker_row

INTERVAL_S = 1.0
Report = worker_pb.WatchLoadResponse | None


class FleetSource(Protocol):
    """What the feed reads of the fleet."""

    def workers(self) -> tuple[Worker, ...]:
        """The view."""
        ...

    def is_live(self) -> bool:
        """Whether a registry is connected, so that the view is current."""
        ...

    def reports(self, start: Start) -> tuple[Report, Report]:
        """The last two load reports of a worker."""
        ...

    def unhealthy(self) -> frozenset[Start]:
        """Workers that do not respond."""
        ...

    def ejected(self) -> frozenset[Start]:
        """Workers whose circuit breakers keep requests away."""
        ...


class FrontendSource(Protocol):
    """What the feed reads of the frontends."""

    def followed(self) -> AbstractAsyncContextManager[None]:
        """A context in which their statistics are followed."""
        ...

    def follow_listed(self) -> None:
        """Apply what the registry lists now."""
        ...

    def samples(self) -> tuple[FrontendSample, ...]:
        """Their state now."""
        ...


@dataclass(slots=True)
class _Row:
    """A worker as it was sent last, and what that was made of."""

    worker: Worker
    load: Report
    health: str
    failures: int
    text: str

    def is_made_of(self, worker: Worker, load: Report, health: str, failures: int) -> bool:
        """Whether nothing has changed since. By identity: comparing two reports costs as much as a new row."""
        is_same = self.worker is worker and self.load is load
        return is_same and (self.health, self.failures) == (health, failures)


class FleetFeed:
    """Snapshots of the fleet, shared by all viewers."""

    def __init__(
        self,
        fleet: FleetSource,
        frontends: FrontendSource,
        head: dict[str, Any],
        now: Callable[[], float] = time.time,
    ) -> None:
        """`head`: what every text says of this frontend. `now`: wall clock in s."""
        self._fleet = fleet
        self._frontends = frontends
        self._head = head
        self._now = now
        self._rows: dict[str, _Row] = {}
        self._number = 0
        """Of the last snapshot; 0: there is none."""
        self._delta = ""
        self._whole: str | None = None
        """The last snapshot in full; None: not asked for yet."""
        self._outside: dict[str, Any] = {}
        """The last snapshot without its workers."""
        self._changed = asyncio.Event()
        self._viewers = 0
        self._has_viewers = asyncio.Event()

    @property
    def viewer_count(self) -> int:
        """Viewers now."""
        return self._viewers

    async def texts(self) -> AsyncGenerator[str, None]:
        """The fleet, then at each interval its changes. A viewer that missed a change gets the fleet again."""
        self._viewers += 1
        self._has_viewers.set()
        seen = 0
        try:
            while True:
                while self._number == seen:
                    await self._changed.wait()
                is_next = bool(seen) and self._number == seen + 1
                seen = self._number
                yield self._delta if is_next else self._full()
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._has_viewers.clear()

    async def run(self) -> None:
        """Take snapshots while there are viewers, until cancelled."""
        while True:
            await self._has_viewers.wait()
            async with self._frontends.followed():
                while self._viewers:
                    self.look()
                    await asyncio.sleep(INTERVAL_S)
                self._rows.clear()
                self._number = 0

    def look(self) -> None:
        """Take a snapshot."""
        self._frontends.follow_listed()
        frontends = self._frontends.samples()
        changed, removed = self._look_at_workers(failures_by_worker(frontends))
        self._outside = {
            **self._head,
            "time_s": round(self._now(), 3),
            "is_registry_live": self._fleet.is_live(),
            "frontends": [frontend_row(sample) for sample in frontends],
            "totals": totals(Sample(time_s=0.0, frontends=frontends)),
        }
        self._whole = None
        self._delta = self._text({"is_whole": False, "removed": removed}, changed)
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _look_at_workers(self, failures: dict[str, int]) -> tuple[list[str], list[str]]:
        """Texts of the rows that have changed, and ids of workers that have left."""
        unhealthy, ejected = self._fleet.unhealthy(), self._fleet.ejected()
        workers = self._fleet.workers()
        changed: list[str] = []
        for worker in workers:
            before, load = self._fleet.reports(worker.start)
            health = "unhealthy" if worker.start in unhealthy else "ejected" if worker.start in ejected else "ok"
            failed = failures.get(worker.worker_id, 0)
            row = self._rows.get(worker.worker_id)
            if row is not None and row.is_made_of(worker, load, health, failed):
                continue
            text = _row_text(worker, before, load, health, failed)
            if row is None or row.text != text:
                changed.append(text)
            self._rows[worker.worker_id] = _Row(worker, load, health, failed, text)
        removed: list[str] = []
        if len(self._rows) > len(workers):
            removed = sorted(self._rows.keys() - {worker.worker_id for worker in workers})
            for name in removed:
                del self._rows[name]
        return changed, removed

    def _full(self) -> str:
        if self._whole is None:
            self._whole = self._text({"is_whole": True, "removed": []}, [row.text for row in self._rows.values()])
        return self._whole

    def _text(self, more: dict[str, Any], rows: list[str]) -> str:
        outside = json.dumps({**self._outside, **more})
        return f'{outside[:-1]}, "workers": [{",".join(rows)}]}}'


def _row_text(worker: Worker, before: Report, load: Report, health: str, failures: int) -> str:
    sample = WorkerSample(
        name=worker.worker_id,
        role=worker.role.value,
        epoch=worker.epoch,
        address=worker.address,
        state=UNREACHABLE if load is None else worker.state.value,
        health=health,
        load=load,
        before=before,
        failures=failures,
    )
    return json.dumps(worker_row(sample, worker))
