"""The runner: the one process of a cluster that runs the batches of a directory, as long as it holds the lock.

Owns the lock and the list of runs. When this process ends, however it ends, the kernel frees the lock, and another
frontend with the same directory, or this one after its restart, goes on within a second.
"""

from __future__ import annotations

import asyncio
import logging

from tandem.clock import monotonic
from tandem.service.background import log_failure
from tandem_frontend.batches.directory import in_thread
from tandem_frontend.batches.records import Batch
from tandem_frontend.batches.run import BatchRun, EndedElsewhere, RunDeps

log = logging.getLogger(__name__)

SCAN_S = 1.0
"""Between two looks for new batches, and two tries to get the lock."""
SWEEP_S = 60.0
FAILED_WAIT_S = 30.0
"""Until a run is tried again that the directory has failed."""


class BatchRunner:
    """Runs batches while it has the lock."""

    def __init__(self, deps: RunDeps) -> None:
        self._deps = deps
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._not_before_s: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._is_running = False

    @property
    def is_leading(self) -> bool:
        """Whether this process runs the batches."""
        return self._is_running

    @property
    def open_count(self) -> int:
        """Batches that this process runs."""
        return len(self._runs)

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def run(self) -> None:
        """Run batches whenever no other process does. Never returns; cancelling it stops all rows."""
        while True:
            try:
                await self._lead()
            except OSError as problem:
                log.error("the batch directory failed: %s; trying again in %g s", problem, FAILED_WAIT_S)
                await asyncio.sleep(FAILED_WAIT_S)
            await asyncio.sleep(SCAN_S)

    async def _lead(self) -> None:
        """Run batches if no other process does."""
        lock = await in_thread(self._deps.directory.lock)
        if lock is None:
            return
        log.info("this process runs the batches of %s now", self._deps.directory.root)
        self._is_running = True
        keeping = asyncio.create_task(self._deps.gate.keep(), name="batch-gate")
        keeping.add_done_callback(log_failure)
        try:
            await self._scan()
        finally:
            self._is_running = False
            tasks = [keeping, *self._runs.values()]
            for task in tasks:
                task.cancel()
            # The lock is another process's only when nothing here writes any more.
            await asyncio.wait(tasks)
            self._runs.clear()
            lock.release()

    async def _scan(self) -> None:
        swept_s = -SWEEP_S
        while True:
            self._wake.clear()
            for batch in await in_thread(self._deps.store.unfinished):
                if batch.id not in self._runs and self._not_before_s.get(batch.id, 0.0) <= monotonic():
                    run = self._run(batch)
                    self._runs[batch.id] = asyncio.create_task(run, name=f"batch-{batch.id}")
            if monotonic() - swept_s >= SWEEP_S:
                swept_s = monotonic()
                await in_thread(self._deps.files.sweep)
                await in_thread(self._deps.store.sweep)
            try:
                async with asyncio.timeout(SCAN_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _run(self, batch: Batch) -> None:
        try:
            # Read again: it may have ended since the list was read.
            batch = await in_thread(self._deps.store.get, batch.tenant, batch.id)
            if not batch.has_ended:
                await BatchRun(batch, self._deps).run()
            self._not_before_s.pop(batch.id, None)
        except EndedElsewhere:
            log.error("another process has ended %s: flock does not hold on the batch directory", batch.id)
        except Exception:
            # A broad except is right here: one batch must not end the others.
            log.exception("the run of %s failed; trying again in %g s", batch.id, FAILED_WAIT_S)
            self._not_before_s[batch.id] = monotonic() + FAILED_WAIT_S
        finally:
            self._runs.pop(batch.id, None)
