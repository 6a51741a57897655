"""Prefix caches of all workers in the view, followed into an index of cached blocks.

Owns one stream of cache events per worker, and when to open another one. Whatever interrupts a stream takes the
worker's credit at once; the next stream begins with a snapshot and restores it. `kv_feed` knows what messages mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client.kv_feed import CacheIndex, FeedBroken, FeedRefused, KvFeed
from tandem.clock import Clock, monotonic
from tandem.domain.worker import Start, Worker
from tandem.errors import NotSupported
from tandem.observability.metrics import Metrics
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_rpc_error
from tandem.service.background import log_failure

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 2.0
SWEEP_EVERY_S = 0.01
FULL_RETRY_S = 60.0
"""A worker that the index has no room for is asked again after so long."""


class KvWatch:
    """Follows the caches of workers. Workers whose engine publishes none are asked once per start."""

    def __init__(
        self, channels: Channels, index: CacheIndex, metrics: Metrics | None = None, clock: Clock = monotonic
    ) -> None:
        """`index` is written by this watch only."""
        self._channels = channels
        self._index = index
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._workers: dict[Start, Worker] = {}
        self._tasks: dict[Start, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def follow(self, workers: Iterable[Worker]) -> None:
        """Set the workers to follow: start new streams, forget workers that left or restarted."""
        wanted = {worker.start: worker for worker in workers}
        for start in [start for start in self._tasks if start not in wanted]:
            self._cancel(start)
            self._drop(start)
        for start, worker in wanted.items():
            if start not in self._tasks:
                self._open(worker)
        self._workers = wanted

    def silent(self, start: Start) -> None:
        """A worker sends nothing on its other streams either: no credit until a new stream brings a snapshot."""
        if self._index.is_followed(start):
            self._cancel(start)
            self._suspect(start, "silent")
            self._open(self._workers[start])

    async def close(self) -> None:
        """Cancel all streams. Idempotent."""
        for start in [*self._tasks]:
            self._cancel(start)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._ending:
            await asyncio.wait(self._ending)

    def _open(self, worker: Worker) -> None:
        task = asyncio.create_task(self._follow(worker), name=f"kv-events-{worker.worker_id}")
        task.add_done_callback(log_failure)
        self._tasks[worker.start] = task

    def _cancel(self, start: Start) -> None:
        task = self._tasks.pop(start)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()

    def _suspect(self, start: Start, why: str) -> None:
        self._index.suspect(start)
        self._tidy()
        self._count_suspicion(why)

    def _drop(self, start: Start) -> None:
        self._index.drop(start)
        self._tidy()

    def _tidy(self) -> None:
        """Free the memory of caches that were given up, also while no other worker publishes anything."""
        if self._sweeper is None and self._index.sweep():
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_EVERY_S, self._tidy_further)

    def _tidy_further(self) -> None:
        self._sweeper = None
        self._tidy()

    def _count_suspicion(self, why: str) -> None:
        self._metrics.count("tandem.prefix.suspicions", 1, {"tandem.reason": why})

    async def _follow(self, worker: Worker) -> None:
        """Open one stream after the other, until the worker turns out to publish nothing that can be followed."""
        start, backoff, is_retry_of_full = worker.start, Backoff(first_s=RETRY_FIRST_S, most_s=RETRY_MOST_S), False
        while True:
            stream = _Stream(worker, self._index, self._clock, is_retry_of_full)
            try:
                await stream.read(WorkerServiceStub(self._channels.get(worker.address)), self._note)
            except FeedRefused as refusal:
                self._refuse(worker, str(refusal))
                return
            except FeedBroken as broken:
                log.info("prefix cache of worker %s: %s; asking for a snapshot", worker.worker_id, broken)
                self._suspect(start, broken.why)
                is_retry_of_full = broken.why == "bound"
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                if isinstance(error, NotSupported):
                    self._drop(start)
                    return
                log.debug("cache events of worker %s failed, reconnecting: %s", worker.worker_id, error)
                self._suspect(start, "broken")
            except Exception:
                # A defect: from here on no change of the cache would be applied.
                self._suspect(start, "broken")
                raise
            if stream.was_current:
                backoff.reset()
            # A worker that breaks off again and again takes at most half of the event loop with its snapshots.
            pause_s = max(backoff.next_s(), stream.snapshot_s)
            await asyncio.sleep(FULL_RETRY_S if is_retry_of_full else pause_s)

    def _note(self, kind: str) -> None:
        if kind == "unknown":
            self._count_suspicion(kind)
        else:
            self._metrics.count("tandem.prefix.snapshots")

    def _refuse(self, worker: Worker, why: str) -> None:
        self._drop(worker.start)
        self._count_suspicion("refused")
        log.warning(
            "cache events of worker %s are not understood: %s; it is routed to by load until its next start",
            worker.worker_id, why,
        )  # fmt: skip


class _Stream:
    """One call of WatchKvEvents, to its end."""

    def __init__(self, worker: Worker, index: CacheIndex, clock: Clock, is_retry_of_full: bool) -> None:
        self._feed = KvFeed(worker, index)
        self._start = worker.start
        self._index = index
        self._clock = clock
        self._is_retry_of_full = is_retry_of_full
        self.was_current = False
        """Whether a snapshot was complete."""
        self.snapshot_s = 0.0
        """How long the last snapshot took."""

    async def read(self, stub: Any, note: Callable[[str], None]) -> None:
        """Apply message after message; `note` gets "snapshot" after the end of one, and each "unknown".

        Raises:
            FeedBroken, FeedRefused: see `KvFeed`; also "bound", where the index has no room.
            AioRpcError: the call failed.
        """
        call = stub.WatchKvEvents(pb.WatchKvEventsRequest(snapshot=True))
        begin_s = self._clock()
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                kind = message.WhichOneof("event")
                if kind == "cache":
                    begin_s = self._clock()
                    self._check_room(message.cache.blocks)
                await self._feed.apply(message)
                if self._feed.is_begun and not self._index.is_followed(self._start):
                    raise FeedBroken("bound", "the index has no room for it")
                if kind == "snapshot" and self._feed.is_current:
                    self.was_current, self.snapshot_s = True, self._clock() - begin_s
                    note(kind)
                elif kind == "unknown":
                    note(kind)
        finally:
            call.cancel()
        raise FeedBroken("broken", "the stream ended")

    def _check_room(self, blocks_count: int) -> None:
        """A cache that did not fit before must fit whole: else it would push others out, and they it, in turn."""
        if self._is_retry_of_full and not self._index.has_room(blocks_count):
            raise FeedBroken("bound", f"the index has no room for {blocks_count} blocks")
