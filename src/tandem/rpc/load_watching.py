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
from tandem.model.worker import EngineLoad, Start, Worker
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.messages import load_from_proto
from tandem.runtime.clock import Clock, monotonic

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
MESSAGES_PER_S_MAX = 200.0
"""Of all workers together: in a large fleet each is asked less often."""
STALE_INTERVALS = 3


class LoadWatch:
    """Loads of workers by start."""

    def __init__(
        self, channels: Channels, *, on_change: Callable[[], None] | None = None, clock: Clock = monotonic
    ) -> None:
        """`on_change` is called after each figure that arrives; must not raise."""
        self._channels = channels
        self._on_change = on_change
        self._clock = clock
        self._interval_s = INTERVAL_S
        self._tasks: dict[Start, asyncio.Task[None]] = {}
        self._loads: dict[Start, tuple[float, EngineLoad]] = {}
        """Until when it counts, and what it is."""

    def of(self, start: Start) -> EngineLoad | None:
        """What a worker said last; None when that is long ago, or it has said nothing yet."""
        known = self._loads.get(start)
        if known is None or self._clock() > known[0]:
            return None
        return known[1]

    def follow(self, workers: Iterable[Worker]) -> None:
        """Follow exactly these from now on."""
        wanted = {worker.start: worker for worker in workers}
        self._interval_s = max(INTERVAL_S, len(wanted) / MESSAGES_PER_S_MAX)
        for start in [start for start in self._tasks if start not in wanted]:
            self._tasks.pop(start).cancel()
            self._loads.pop(start, None)
        for start, worker in wanted.items():
            if start not in self._tasks:
                task = asyncio.create_task(self._follow(worker), name=f"load-{worker.worker_id}")
                self._tasks[start] = task

    async def close(self) -> None:
        """Follow nobody any more. May be called twice."""
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
                        until_s = self._clock() + STALE_INTERVALS * interval_s
                        self._loads[worker.start] = until_s, load_from_proto(said)
                        backoff.reset()
                        if self._on_change is not None:
                            self._on_change()
            except grpc.aio.AioRpcError as failure:
                log.debug("load of %s is not told: %s", worker.worker_id, failure.details())
            finally:
                call.cancel()
            await asyncio.sleep(backoff.next_s())
