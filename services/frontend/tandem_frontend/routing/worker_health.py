"""Health of the workers as this frontend itself sees it, over the connections that it uses anyway.

One health stream (grpc.health.v1 Watch) per worker: it breaks when the process dies, reports NOT_SERVING, and costs
nothing otherwise. A frozen process keeps its connections, so each worker is also checked in turns, and at once when it
does not accept a leg. An unhealthy worker is avoided until it responds again, never excluded. Only time in which this
frontend's own event loop ran counts as a worker's silence. Independent of the registry, and never changes the view.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Iterable

from tandem.client.health_calls import HealthWatch, check_health
from tandem.domain.worker import Start, Worker, WorkerState
from tandem.errors import DeadlinePassed, NotSupported, StartError, TandemError
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.service.awake_timers import AwakeTimers

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 0.5
CHECK_INTERVAL_S = 0.5
CHECKS_PER_S_MAX = 40
"""Of all workers together: about 4 % of a core. The more workers there are, the fewer requests hit a frozen one."""
OPENING_MAX = 16
"""Concurrent connects; a thousand at once would not all complete within gRPC's connect timeout."""
OPENING_TIMEOUT_S = 1.0
DRAIN_NOTICE_S = 0.5
"""How much later than a worker's NOT_SERVING its DRAINING may arrive in the view."""
NOT_SERVING = "it reports NOT_SERVING"


class WorkerHealth:
    """Follows the health of the workers of the view, from `start` to `close`."""

    def __init__(self, channels: Channels, timers: AwakeTimers) -> None:
        self._channels = channels
        self._timers = timers
        self._opening = asyncio.Semaphore(OPENING_MAX)
        self._followed: dict[Start, tuple[Worker, asyncio.Task[None]]] = {}
        self._on: dict[Start, object] = {}
        """The channel of each stream."""
        self._down: set[Start] = set()
        """Workers whose health stream broke or reported NOT_SERVING."""
        self._silent: dict[Start, asyncio.Task[None]] = {}
        """Workers whose last health check timed out, with the task that repeats it until it succeeds."""
        self._unhealthy: frozenset[Start] | None = frozenset()
        """`_down` and `_silent` together; None: to be recomputed."""
        self._logged: set[Start] = set()
        """Unhealthy or draining workers that were logged as such, and need a line that ends it."""
        self._changed = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None

    def unhealthy(self) -> frozenset[Start]:
        """Workers to be avoided now; the same object until the set changes."""
        if self._unhealthy is None:
            self._unhealthy = frozenset(self._down.union(self._silent))
        return self._unhealthy

    async def start(self) -> None:
        """Begin to check."""
        self._rounds = asyncio.create_task(self._check_all(), name="health-rounds")

    def follow(self, workers: Iterable[Worker]) -> None:
        """Watch these workers and no others. A restarted worker begins as healthy."""
        wanted = {worker.start: worker for worker in workers}
        for start in [start for start in self._followed if start not in wanted]:
            if start in self._logged:
                log.info("worker %s (epoch %d) has left the registry: it is no longer watched", *start)
            self._forget(start)
        for start, worker in wanted.items():
            if start in self._followed:
                # Its state may have changed.
                self._followed[start] = worker, self._followed[start][1]
            else:
                self._begin(worker)
        self._changed.set()

    async def check(self, worker: Worker) -> bool:
        """Check a worker's health once. One that times out is unhealthy until a later check succeeds."""
        try:
            async with self._timers.within(CHECK_TIMEOUT_S):
                return await check_health(self._channels.get(worker.address))
        except TimeoutError:
            self._note_silent(worker)
            return False
        except NotSupported:
            return True
        except TandemError:
            # Unreachable: its health stream breaks too, which marks it.
            return False

    async def close(self) -> None:
        """Stop all watching. May be called twice."""
        tasks = [task for _, task in self._followed.values()] + list(self._silent.values())
        if self._rounds is not None:
            tasks.append(self._rounds)
        for start in list(self._followed):
            self._forget(start)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, worker: Worker) -> None:
        task = asyncio.create_task(self._watch(worker), name=f"health-{worker.worker_id}")
        self._followed[worker.start] = (worker, task)

    def _follow_channel(self, worker: Worker) -> None:
        """Move the stream to the worker's new channel after a certificate renewal: the old channel waits for that."""
        channel = self._on.get(worker.start)
        if channel is not None and channel is not self._channels.get(worker.address):
            self._on.pop(worker.start)
            self._followed[worker.start][1].cancel()
            self._begin(worker)

    def _forget(self, start: Start) -> None:
        _, task = self._followed.pop(start)
        task.cancel()
        self._down.discard(start)
        self._logged.discard(start)
        self._unhealthy = None
        self._on.pop(start, None)
        checking = self._silent.pop(start, None)
        if checking is not None:
            checking.cancel()

    async def _watch(self, worker: Worker) -> None:
        """Watch one worker until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._follow_stream(worker, backoff)
            except NotSupported:
                # A worker of another implementation, without a health service: only its response to legs counts.
                return self._note(worker, "")
            except TandemError as problem:
                self._note(worker, problem.message)
            await asyncio.sleep(backoff.next_s())

    async def _follow_stream(self, worker: Worker, backoff: Backoff) -> None:
        """Read one health stream to its end, which is always an error.

        A worker that is not known to be down connects within `_opening`, and must respond in time. To one that is down
        gRPC reconnects by itself, and there is nothing to do until it has.
        """
        is_down = worker.start in self._down
        channel = self._on[worker.start] = self._channels.get(worker.address)
        watch: HealthWatch | None = None
        try:
            if is_down:
                watch = HealthWatch(channel, waits=True)
            else:
                async with self._opening, self._timers.within(OPENING_TIMEOUT_S):
                    watch = HealthWatch(channel, waits=False)
                    self._note(worker, "" if await watch.read() else NOT_SERVING)
            while True:
                self._note(worker, "" if await watch.read() else NOT_SERVING)
                backoff.reset()
        except TimeoutError:
            raise DeadlinePassed(f"no response within {OPENING_TIMEOUT_S:g} s") from None
        finally:
            if watch is not None:
                watch.close()

    def _note(self, worker: Worker, problem: str) -> None:
        """Record the state that a stream reported; "": serving."""
        if not problem and worker.start in self._down:
            self._down.discard(worker.start)
            self._unhealthy = None
            self._log_healthy(worker.start, "its health stream reports SERVING")
        elif problem and worker.start not in self._down:
            self._down.add(worker.start)
            self._unhealthy = None
            # A drain is announced in the registry and in the health stream at once: the view may be the later one.
            pause_s = DRAIN_NOTICE_S if problem == NOT_SERVING else 0.0
            self._timers.after(pause_s, lambda: self._log_down(worker.start, problem))

    def _log_down(self, start: Start, problem: str) -> None:
        """Log a worker that is still down; a drain that was asked for is no warning."""
        if start not in self._down or start not in self._followed or start in self._logged:
            return
        self._logged.add(start)
        if self._followed[start][0].state is WorkerState.DRAINING:
            log.info("worker %s is draining: it gets no new requests", start[0])
        else:
            log.warning("worker %s is unhealthy and avoided: %s", start[0], problem)

    def _log_healthy(self, start: Start, why: str) -> None:
        """Log the end of what `_log_down` or `_note_silent` logged."""
        if start in self._logged and start not in self._down and start not in self._silent:
            self._logged.discard(start)
            log.info("worker %s is healthy again: %s", start[0], why)

    def _note_silent(self, worker: Worker) -> None:
        if worker.start in self._followed and worker.start not in self._silent:
            log.warning(
                "worker %s is unhealthy and avoided: no response to a health check within %g s",
                worker.worker_id, CHECK_TIMEOUT_S,
            )  # fmt: skip
            self._logged.add(worker.start)
            # In a context of its own: it outlives the request whose leg the worker did not accept.
            checking = asyncio.create_task(
                self._check_until_healthy(worker), name=f"silent-{worker.worker_id}", context=contextvars.Context()
            )
            self._silent[worker.start] = checking
            self._unhealthy = None

    async def _check_until_healthy(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if await self.check(worker):
                del self._silent[worker.start]
                self._unhealthy = None
                self._log_healthy(worker.start, "it responds to health checks")
                return

    async def _check_all(self) -> None:
        """Check each worker in turn until cancelled; the fewer workers there are, the more often."""
        checks: set[asyncio.Task[bool]] = set()
        while True:
            workers = [worker for worker, _ in self._followed.values()]
            if not workers:
                self._changed.clear()
                await self._changed.wait()
            pause_s = max(CHECK_INTERVAL_S / max(1, len(workers)), 1 / CHECKS_PER_S_MAX)
            for worker in workers:
                await asyncio.sleep(pause_s)
                if worker.start not in self._followed:
                    continue
                # Without usable TLS files there is no channel at all, which the stream itself reports.
                with contextlib.suppress(StartError):
                    self._follow_channel(worker)
                if worker.start not in self._down and worker.start not in self._silent:
                    checks = {task for task in checks if not task.done()}
                    checks.add(asyncio.create_task(self.check(worker)))
