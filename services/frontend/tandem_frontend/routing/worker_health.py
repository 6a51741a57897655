"""Which workers are dead or do not answer, seen by this frontend itself over the connections it uses anyway.

A stream of health to each worker of the view ends when its process dies and says when it no longer serves; it costs
nothing while nothing happens. Who is frozen keeps its connections: each worker is asked now and then, and at once when
it does not take a leg. Whoever fails is avoided until it answers again, never excluded. Only time in which this
frontend's own loop ran counts as a worker's silence. Needs no registry, and changes no view.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Iterable

from tandem.client.health_calls import HealthWatch, check_health
from tandem.domain.worker import Start, Worker
from tandem.errors import DeadlinePassed, NotSupported, StartError, TandemError
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.service.awake_timers import AwakeTimers

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 0.5
CHECK_INTERVAL_S = 0.5
CHECKS_PER_S_MAX = 40
"""Of all workers together: about four hundredths of a core. The more workers there are, the fewer requests meet one."""
OPENING_MAX = 16
"""Connections made at a time; a thousand at once would not all be made within the time that gRPC gives each."""
OPENING_TIMEOUT_S = 1.0


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
        """Whose stream of health ended, or who said that it does not serve."""
        self._silent: dict[Start, asyncio.Task[None]] = {}
        """Who did not answer a question, with who asks it again until it does."""
        self._unhealthy: frozenset[Start] | None = frozenset()
        """Those of both; None: they have changed since."""
        self._changed = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None

    def unhealthy(self) -> frozenset[Start]:
        """Those to be avoided now; the same object until one comes or goes."""
        if self._unhealthy is None:
            self._unhealthy = frozenset(self._down.union(self._silent))
        return self._unhealthy

    async def start(self) -> None:
        """Begin to ask."""
        self._rounds = asyncio.create_task(self._ask_all(), name="health-rounds")

    def follow(self, workers: Iterable[Worker]) -> None:
        """Follow these workers and nobody else. A new start of one of them begins with a clean sheet."""
        wanted = {worker.start: worker for worker in workers}
        for start in [start for start in self._followed if start not in wanted]:
            self._forget(start)
        for start, worker in wanted.items():
            if start not in self._followed:
                self._begin(worker)
        self._changed.set()

    async def answers(self, worker: Worker) -> bool:
        """Ask a worker whether it serves. Silence is remembered until it has answered."""
        try:
            async with self._timers.within(CHECK_TIMEOUT_S):
                return await check_health(self._channels.get(worker.address))
        except TimeoutError:
            self._note_silent(worker)
            return False
        except NotSupported:
            return True
        except TandemError:
            # It cannot be reached, which its stream tells too.
            return False

    async def close(self) -> None:
        """Ask nobody any more. May be called twice."""
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
        """Leave a channel that was replaced, as all are when the certificate has been renewed: it waits for that."""
        channel = self._on.get(worker.start)
        if channel is not None and channel is not self._channels.get(worker.address):
            self._on.pop(worker.start)
            self._followed[worker.start][1].cancel()
            self._begin(worker)

    def _forget(self, start: Start) -> None:
        _, task = self._followed.pop(start)
        task.cancel()
        self._down.discard(start)
        self._unhealthy = None
        self._on.pop(start, None)
        asking = self._silent.pop(start, None)
        if asking is not None:
            asking.cancel()

    async def _watch(self, worker: Worker) -> None:
        """Follow one worker for ever."""
        backoff = Backoff()
        while True:
            try:
                await self._follow_stream(worker, backoff)
            except NotSupported:
                # Somebody else's worker, without health: only its answers to legs count.
                return self._note(worker, "")
            except TandemError as problem:
                self._note(worker, problem.message)
            await asyncio.sleep(backoff.next_s())

    async def _follow_stream(self, worker: Worker, backoff: Backoff) -> None:
        """Follow one stream to its end, which is always an error.

        The first answer of a worker that is not known to be down takes one of the few places for that. gRPC itself goes
        on connecting to one that is, and nothing is to be done until it has.
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
                    self._note(worker, "" if await watch.read() else "it says so")
            while True:
                self._note(worker, "" if await watch.read() else "it says so")
                backoff.reset()
        except TimeoutError:
            raise DeadlinePassed(f"no answer within {OPENING_TIMEOUT_S:g} s") from None
        finally:
            if watch is not None:
                watch.close()

    def _note(self, worker: Worker, problem: str) -> None:
        """What a stream has said: nothing where it serves."""
        if not problem and worker.start in self._down:
            log.info("worker %s serves again", worker.worker_id)
            self._down.discard(worker.start)
            self._unhealthy = None
        elif problem and worker.start not in self._down:
            log.warning("worker %s does not serve: %s", worker.worker_id, problem)
            self._down.add(worker.start)
            self._unhealthy = None

    def _note_silent(self, worker: Worker) -> None:
        if worker.start in self._followed and worker.start not in self._silent:
            log.warning("worker %s does not answer within %g s", worker.worker_id, CHECK_TIMEOUT_S)
            # In a context of its own: it goes on when the request that has met the silence is long over.
            asking = asyncio.create_task(
                self._ask_until_it_answers(worker), name=f"silent-{worker.worker_id}", context=contextvars.Context()
            )
            self._silent[worker.start] = asking
            self._unhealthy = None

    async def _ask_until_it_answers(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if await self.answers(worker):
                log.info("worker %s answers again", worker.worker_id)
                del self._silent[worker.start]
                self._unhealthy = None
                return

    async def _ask_all(self) -> None:
        """Ask each worker in turn, for ever: as often as there are few of them."""
        asked: set[asyncio.Task[bool]] = set()
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
                # Without usable TLS files there is no channel at all, which the stream itself tells.
                with contextlib.suppress(StartError):
                    self._follow_channel(worker)
                if worker.start not in self._down and worker.start not in self._silent:
                    asked = {task for task in asked if not task.done()}
                    asked.add(asyncio.create_task(self.answers(worker)))
