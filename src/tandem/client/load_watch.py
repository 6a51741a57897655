"""What workers say of their load, followed for as long as they are in the view.

Owns one stream for each worker and the last figures of each. A figure that is old is no figure: it is forgotten.
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
from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.convert import load_from_proto
from tandem.service.expiries import Expiries

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
MESSAGES_PER_S_MAX = 200.0
"""Of all workers together: in a large fleet each is asked less often."""
STALE_INTERVALS = 3


class LoadWatch:
    """Loads of workers by start."""

    def __init__(
        self,
        channels: Channels,
        *,
        on_change: Callable[[Start, EngineLoad | None], None] | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`on_change` is called with each load that arrives, and with None where one is forgotten; must not raise."""
        self._channels = channels
        self._on_change = on_change
        self._clock = clock
        self._interval_s = INTERVAL_S
        self._tasks: dict[Start, asyncio.Task[None]] = {}
        self._loads: dict[Start, EngineLoad] = {}
        self._fresh: Expiries[Start] = Expiries()
        """Until when each of them counts."""
        self._timer: asyncio.TimerHandle | None = None
        """One for all of them."""

    def of(self, start: Start) -> EngineLoad | None:
        """What a worker said last; None when that is long ago, or it has said nothing yet."""
        return self._loads.get(start) if self._fresh.is_live(start, self._clock()) else None

    def follow(self, workers: Iterable[Worker]) -> None:
        """Follow exactly these from now on."""
        wanted = {worker.start: worker for worker in workers}
        self._interval_s = max(INTERVAL_S, len(wanted) / MESSAGES_PER_S_MAX)
        for start in [start for start in self._tasks if start not in wanted]:
            self._tasks.pop(start).cancel()
            self._forget(start)
        for start, worker in wanted.items():
            if start not in self._tasks:
                task = asyncio.create_task(self._follow(worker), name=f"load-{worker.worker_id}")
                self._tasks[start] = task

    async def close(self) -> None:
        """Follow no worker any more. May be called twice."""
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
            # A stream keeps the pace it was asked for, however the fleet grows or shrinks meanwhile.
            interval_s = self._interval_s
            call = stub.WatchLoad(pb.WatchLoadRequest(interval_ms=int(interval_s * 1_000)))
            try:
                while (said := await call.read()) is not grpc.aio.EOF:
                    if said.epoch == worker.epoch:
                        self._keep(worker.start, load_from_proto(said), STALE_INTERVALS * interval_s)
                        backoff.reset()
            except grpc.aio.AioRpcError as failure:
                log.debug("load of %s is not told: %s", worker.worker_id, failure.details())
            finally:
                call.cancel()
            await asyncio.sleep(backoff.next_s())

    def _keep(self, start: Start, load: EngineLoad, fresh_s: float) -> None:
        self._loads[start] = load
        self._fresh.set(start, self._clock() + fresh_s)
        self._set_timer()
        self._tell(start, load)

    def _forget(self, start: Start) -> None:
        self._fresh.discard(start)
        if self._loads.pop(start, None) is not None:
            self._tell(start, None)

    def _forget_old(self) -> None:
        self._timer = None
        for start in self._fresh.take(self._clock()):
            self._forget(start)
        self._set_timer()

    def _set_timer(self) -> None:
        """Look again when the first load may have become old."""
        next_s = self._fresh.next_s()
        if next_s is None:
            return
        loop = asyncio.get_running_loop()
        when_s = loop.time() + next_s - self._clock()
        if self._timer is not None and when_s < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = loop.call_at(when_s, self._forget_old)

    def _tell(self, start: Start, load: EngineLoad | None) -> None:
        if self._on_change is not None:
            self._on_change(start, load)
