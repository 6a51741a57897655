"""Load reports of all workers in the view.

Owns one stream per worker and its last report. A report expires after `STALE_INTERVALS`, and not before `EXPIRY_MIN_S`:
stale load would misguide admission.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.clock import Clock, monotonic
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.convert import load_from_proto
from tandem.service.background import log_failure
from tandem.service.expiries import Expiries

log = logging.getLogger(__name__)

INTERVAL_S = 0.25
CHANGE_INTERVAL_S = 0.02
"""A worker reports sooner when prompts come or are computed, at most so often. Frontends know each other's requests
from these reports alone; ADR 21 has what later ones cost."""
CHANGES_PER_S_MAX = 400.0
"""Limit on these reports, over all workers that compute prompts."""
MESSAGES_PER_S_MAX = 200.0
"""Limit over all workers: in a large fleet each one reports less often."""
STALE_INTERVALS = 3
EXPIRY_MIN_S = 3.0
"""A worker whose process is held up for a moment is not one of unknown load."""


class LoadWatch:
    """Last load report of each worker, by start."""

    def __init__(
        self,
        channels: Channels,
        *,
        on_change: Callable[[Start, EngineLoad | None], None] | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`on_change` is called with each report, and with None when one expires; must not raise."""
        self._channels = channels
        self._on_change = on_change
        self._clock = clock
        self._interval_s = INTERVAL_S
        self._change_interval_s = CHANGE_INTERVAL_S
        self._tasks: dict[Start, asyncio.Task[None]] = {}
        self._loads: dict[Start, EngineLoad] = {}
        self._reports: dict[Start, tuple[pb.WatchLoadResponse | None, pb.WatchLoadResponse]] = {}
        """The last two reports as they came: their counters give rates, which only viewers of the fleet ask for."""
        self._fresh: Expiries[Start] = Expiries()
        """Expiry time of each report."""
        self._timer: asyncio.Handle | None = None
        """One timer for the next expiry of any report."""
        self._timer_s = 0.0
        """When it fires, on the loop's clock. Not asked from it: uvloop's handle of a time that is past has none."""

    def of(self, start: Start) -> EngineLoad | None:
        """Last report of a worker; None: expired, or none received yet."""
        return self._loads.get(start) if self._fresh.is_live(start, self._clock()) else None

    def reports(self, start: Start) -> tuple[pb.WatchLoadResponse | None, pb.WatchLoadResponse | None]:
        """The report before the last one and the last one of a worker; None: expired, or none received yet."""
        if not self._fresh.is_live(start, self._clock()):
            return None, None
        return self._reports.get(start, (None, None))

    def follow(self, workers: Iterable[Worker]) -> None:
        """Set the workers to follow: start new streams, cancel those of other workers."""
        wanted = {worker.start: worker for worker in workers}
        self._interval_s = max(INTERVAL_S, len(wanted) / MESSAGES_PER_S_MAX)
        computing_count = sum(worker.role is not WorkerRole.DECODE for worker in wanted.values())
        self._change_interval_s = max(CHANGE_INTERVAL_S, computing_count / CHANGES_PER_S_MAX)
        for start in [start for start in self._tasks if start not in wanted]:
            self._tasks.pop(start).cancel()
            self._forget(start)
        for start, worker in wanted.items():
            if start not in self._tasks:
                task = asyncio.create_task(self._follow(worker), name=f"load-{worker.worker_id}")
                task.add_done_callback(log_failure)
                self._tasks[start] = task

    async def close(self) -> None:
        """Cancel all streams. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, worker: Worker) -> None:
        backoff = Backoff(first_s=0.5, most_s=5.0)
        while True:
            stub: Any = WorkerServiceStub(self._channels.get(worker.address))
            # A stream keeps its interval even if the fleet size changes, so its expiry is computed from that interval.
            interval_s = self._interval_s
            change_interval_ms = int(self._change_interval_s * 1_000)
            call = stub.WatchLoad(
                pb.WatchLoadRequest(interval_ms=int(interval_s * 1_000), change_interval_ms=change_interval_ms)
            )
            try:
                while (report := await call.read()) is not grpc.aio.EOF:
                    if report.epoch == worker.epoch:
                        self._reports[worker.start] = self._reports.get(worker.start, (None, None))[1], report
                        self._keep(
                            worker.start, load_from_proto(report), max(EXPIRY_MIN_S, STALE_INTERVALS * interval_s)
                        )
                        backoff.reset()
            except grpc.aio.AioRpcError as failure:
                log.debug("load stream of worker %s failed, reconnecting: %s", worker.worker_id, failure.details())
            finally:
                call.cancel()
            await asyncio.sleep(backoff.next_s())

    def _keep(self, start: Start, load: EngineLoad, expires_in_s: float) -> None:
        self._loads[start] = load
        self._fresh.set(start, self._clock() + expires_in_s)
        self._set_timer()
        self._notify(start, load)

    def _forget(self, start: Start) -> None:
        self._fresh.discard(start)
        self._reports.pop(start, None)
        if self._loads.pop(start, None) is not None:
            self._notify(start, None)

    def _expire(self) -> None:
        self._timer = None
        for start in self._fresh.take(self._clock()):
            self._forget(start)
        self._set_timer()

    def _set_timer(self) -> None:
        """Schedule `_expire` for the earliest expiry."""
        next_s = self._fresh.next_s()
        if next_s is None:
            return
        loop = asyncio.get_running_loop()
        when_s = loop.time() + next_s - self._clock()
        if self._timer is not None and when_s < self._timer_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer, self._timer_s = loop.call_at(when_s, self._expire), when_s

    def _notify(self, start: Start, load: EngineLoad | None) -> None:
        if self._on_change is not None:
            self._on_change(start, load)
