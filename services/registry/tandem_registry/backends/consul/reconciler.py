"""What this replica wants Consul to hold, and the writes that bring it there.

Owns one desired entry for each service id, the order of writes of one id, how many go at once, and the tries after a
failure. Decides nothing: `keeper` wants, and the answers of Consul say what is missing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from dataclasses import dataclass, field
from enum import IntEnum

from tandem.clock import Clock
from tandem.errors import ServiceError
from tandem.rpc.backoff import Backoff
from tandem_registry.backends.consul.client import ConsulClient
from tandem_registry.backends.consul.records import Record
from tandem_registry.backends.consul.transport import is_refusal
from tandem_registry.view import Health

log = logging.getLogger(__name__)

WRITERS = 4
SETTLE_S = 1.0
"""An agent tells the servers within this time what was written to it."""
SPREAD_S = 0.5
"""After an outage all replicas write again, each beginning at a moment of its own."""
REWRITES_PER_S = 100
"""When Consul has lost everything, each entry is written at a moment of its own, in all at about this rate ..."""
REWRITE_MAX_S = 2.0
"""... but within this time."""


class Urgency(IntEnum):
    """Which write goes first: somebody waits for it, the view lacks it, or it changes nothing that is seen."""

    AWAITED = 0
    SEEN = 1
    UNSEEN = 2


@dataclass(slots=True)
class _Line:
    """One service id."""

    record: Record | None
    """What is wanted; None: nothing."""
    health: Health = Health.PASSING
    version: int = 0
    written_version: int = -1
    written_s: float = 0.0
    not_before_s: float = 0.0
    is_queued: bool = False
    waiters: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)


class Reconciler:
    """Desired entries by service id."""

    def __init__(self, client: ConsulClient, keeper: str, clock: Clock, rng: random.Random | None = None) -> None:
        self._client = client
        self._leases = keeper
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._lines: dict[str, _Line] = {}
        self._queue: asyncio.PriorityQueue[tuple[Urgency, int, str]] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._writers: list[asyncio.Task[None]] = []
        self._told = ""
        self._reachable = asyncio.Event()
        self._reachable.set()

    async def start(self) -> None:
        """Begin to write."""
        self._writers = [asyncio.create_task(self._write_all(), name=f"consul-writer-{n}") for n in range(WRITERS)]

    async def close(self) -> None:
        """Stop writing; what is not written yet stays unwritten. May be called twice."""
        for task in self._writers:
            task.cancel()
        if self._writers:
            await asyncio.wait(self._writers)
        for line in self._lines.values():
            for _, waiter in line.waiters:
                waiter.cancel()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """They never end by themselves."""
        return self._writers

    def want(
        self,
        entry_id: str,
        record: Record | None,
        health: Health = Health.PASSING,
        urgency: Urgency = Urgency.SEEN,
    ) -> None:
        """Let Consul hold that entry, or none; returns before it does."""
        line = self._lines.setdefault(entry_id, _Line(record))
        line.record, line.health = record, health
        line.version += 1
        self._enqueue(entry_id, line, urgency)

    def disown(self, entry_id: str) -> None:
        """The entry is another replica's now: do nothing about it any more."""
        line = self._lines.pop(entry_id, None)
        for _, waiter in line.waiters if line is not None else ():
            if not waiter.done():
                waiter.set_exception(ServiceError("another registry has taken the lease over"))

    def wanted(self, entry_id: str) -> Record | None:
        """What is wanted at that id."""
        line = self._lines.get(entry_id)
        return None if line is None else line.record

    def is_ending(self, entry_id: str) -> bool:
        """Whether an entry is to go and has not gone yet."""
        line = self._lines.get(entry_id)
        return line is not None and (line.record is None or line.record.is_gone)

    async def written(self, entry_id: str) -> None:
        """Return when the agent holds what is wanted now.

        Raises:
            ServiceError: it was refused, or is another replica's by now.
        """
        line = self._lines.get(entry_id)
        if line is None or line.written_version >= line.version:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiters.append((line.version, waiter))
        await waiter

    def missing(self, entry_id: str) -> bool:
        """Consul does not show what was written: write it again, unless it may be on its way. Returns whether to look
        again later.
        """
        line = self._lines.get(entry_id)
        if line is None or line.record is None:
            return False
        if not line.is_queued and self._clock() - line.written_s >= SETTLE_S:
            self.want(entry_id, line.record, line.health)
        return True

    def all_missing(self, first: str) -> None:
        """Consul begins anew: write everything again, spread over a while; the entry that is named at once."""
        now_s, spread_s = self._clock(), min(REWRITE_MAX_S, max(SPREAD_S, len(self._lines) / REWRITES_PER_S))
        for entry_id, line in list(self._lines.items()):
            if line.record is not None:
                line.not_before_s = 0.0 if entry_id == first else now_s + self._rng.uniform(0, spread_s)
                self.want(entry_id, line.record, line.health)
            elif not line.is_queued:
                del self._lines[entry_id]

    def pause(self) -> None:
        """Consul cannot be reached: write nothing until it can."""
        self._reachable.clear()

    def resume(self) -> None:
        """Consul can be reached."""
        self._reachable.set()

    def _enqueue(self, entry_id: str, line: _Line, urgency: Urgency) -> None:
        if not line.is_queued:
            line.is_queued = True
            self._queue.put_nowait((urgency, next(self._numbers), entry_id))

    async def _write_all(self) -> None:
        backoff = Backoff(rng=self._rng)
        while True:
            urgency, _, entry_id = await self._queue.get()
            if not self._reachable.is_set():
                await self._reachable.wait()
                await asyncio.sleep(self._rng.uniform(0, SPREAD_S))
            line = self._lines.get(entry_id)
            if line is None:
                continue
            if (delay_s := line.not_before_s - self._clock()) > 0:
                again = (urgency, next(self._numbers), entry_id)
                asyncio.get_running_loop().call_later(delay_s, self._queue.put_nowait, again)
                continue
            try:
                await self._write(entry_id, line)
            except ServiceError as problem:
                self._tell(entry_id, line, problem)
            else:
                backoff.reset()
                continue
            # The id stays queued, so that no other writer takes it.
            await asyncio.sleep(backoff.next_s())
            self._queue.put_nowait((urgency, next(self._numbers), entry_id))

    async def _write(self, entry_id: str, line: _Line) -> None:
        """Write until what is held is what is wanted."""
        while True:
            version, record = line.version, line.record
            if record is not None:
                await self._client.register(record, line.health)
            elif await self._client.keeper_of(entry_id) == self._leases:
                # Another replica at this agent may have taken the entry over since; it is its own then.
                await self._client.deregister(entry_id)
            line.written_version, line.written_s = version, self._clock()
            for wanted, waiter in line.waiters:
                if wanted <= version and not waiter.done():
                    waiter.set_result(None)
            line.waiters = [(wanted, waiter) for wanted, waiter in line.waiters if not waiter.done()]
            if line.version == version:
                break
        line.is_queued = False
        if line.record is None and self._lines.get(entry_id) is line:
            del self._lines[entry_id]

    def _tell(self, entry_id: str, line: _Line, error: ServiceError) -> None:
        """Say once what keeps failing; whoever waits for what is refused waits in vain."""
        if not is_refusal(error):
            log.debug("%s is not written yet: %s", entry_id, error)
            return
        if str(error) != self._told:
            log.error("%s is not written: %s", entry_id, error)
            self._told = str(error)
        for _, waiter in line.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        line.waiters = []
