"""Desired state of this replica's Consul entries, and the writes that reconcile Consul with it.

Owns one desired entry for each service id, the order of writes of one id, their concurrency, and retries. Decides
nothing: `lease_manager` sets the desired state and reports which entries Consul lacks.
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
"""An agent syncs a write to the servers within this time; an entry that is missing earlier is not rewritten."""
SPREAD_S = 0.5
"""Jitter: after an outage all replicas resume writing within this time, not at the same moment."""
REWRITES_PER_S = 100
"""When Consul has lost its data, entries are rewritten with jitter, at about this rate in total ..."""
REWRITE_MAX_S = 2.0
"""... but all within this time."""


class Urgency(IntEnum):
    """Order of writes: those a call waits for, those the view lacks, those that do not change the view."""

    AWAITED = 0
    SEEN = 1
    UNSEEN = 2


@dataclass(slots=True)
class _Desired:
    """Desired state of one service id."""

    record: Record | None
    """The entry; None: there must be none."""
    health: Health = Health.PASSING
    version: int = 0
    written_version: int = -1
    written_s: float = 0.0
    not_before_s: float = 0.0
    is_queued: bool = False
    waiters: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)


class Reconciler:
    """Desired entries by service id."""

    def __init__(self, client: ConsulClient, replica_id: str, clock: Clock, rng: random.Random | None = None) -> None:
        self._client = client
        self._replica_id = replica_id
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._desired: dict[str, _Desired] = {}
        self._queue: asyncio.PriorityQueue[tuple[Urgency, int, str]] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._writers: list[asyncio.Task[None]] = []
        self._logged_error = ""
        self._reachable = asyncio.Event()
        self._reachable.set()

    async def start(self) -> None:
        """Start the writer tasks."""
        self._writers = [asyncio.create_task(self._write_all(), name=f"consul-writer-{n}") for n in range(WRITERS)]

    async def close(self) -> None:
        """Stop writing; queued writes are dropped. May be called twice."""
        for task in self._writers:
            task.cancel()
        if self._writers:
            await asyncio.wait(self._writers)
        for desired in self._desired.values():
            for _, waiter in desired.waiters:
                waiter.cancel()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The writer tasks; one that ends has failed."""
        return self._writers

    def want(
        self,
        entry_id: str,
        record: Record | None,
        health: Health = Health.PASSING,
        urgency: Urgency = Urgency.SEEN,
    ) -> None:
        """Set the desired entry of a service id, or None to remove it; returns before it is written."""
        desired = self._desired.setdefault(entry_id, _Desired(record))
        desired.record, desired.health = record, health
        desired.version += 1
        self._enqueue(entry_id, desired, urgency)

    def disown(self, entry_id: str) -> None:
        """Forget a service id whose entry another replica owns now."""
        desired = self._desired.pop(entry_id, None)
        for _, waiter in desired.waiters if desired is not None else ():
            if not waiter.done():
                waiter.set_exception(ServiceError("another registry has adopted the lease"))

    def wanted(self, entry_id: str) -> Record | None:
        """The desired entry of a service id; None: none."""
        desired = self._desired.get(entry_id)
        return None if desired is None else desired.record

    def is_ending(self, entry_id: str) -> bool:
        """Whether an entry is being removed."""
        desired = self._desired.get(entry_id)
        return desired is not None and (desired.record is None or desired.record.is_gone)

    async def written(self, entry_id: str) -> None:
        """Return once the agent has the entry that is desired now.

        Raises:
            ServiceError: Consul rejected it, or another replica owns it now.
        """
        desired = self._desired.get(entry_id)
        if desired is None or desired.written_version >= desired.version:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        desired.waiters.append((desired.version, waiter))
        await waiter

    def rewrite_missing(self, entry_id: str) -> bool:
        """Write an entry again that Consul does not show, unless its write may still be propagating. Returns whether to
        check again later.
        """
        desired = self._desired.get(entry_id)
        if desired is None or desired.record is None:
            return False
        if not desired.is_queued and self._clock() - desired.written_s >= SETTLE_S:
            self.want(entry_id, desired.record, desired.health)
        return True

    def rewrite_all(self, first: str) -> None:
        """Write all entries again after Consul has lost its data, with jitter; `first` is written at once."""
        now_s, spread_s = self._clock(), min(REWRITE_MAX_S, max(SPREAD_S, len(self._desired) / REWRITES_PER_S))
        for entry_id, desired in list(self._desired.items()):
            if desired.record is not None:
                desired.not_before_s = 0.0 if entry_id == first else now_s + self._rng.uniform(0, spread_s)
                self.want(entry_id, desired.record, desired.health)
            elif not desired.is_queued:
                del self._desired[entry_id]

    def pause(self) -> None:
        """Stop writing while Consul is unreachable."""
        self._reachable.clear()

    def resume(self) -> None:
        """Write again: Consul is reachable."""
        self._reachable.set()

    def _enqueue(self, entry_id: str, desired: _Desired, urgency: Urgency) -> None:
        if not desired.is_queued:
            desired.is_queued = True
            self._queue.put_nowait((urgency, next(self._numbers), entry_id))

    async def _write_all(self) -> None:
        backoff = Backoff(rng=self._rng)
        while True:
            urgency, _, entry_id = await self._queue.get()
            if not self._reachable.is_set():
                await self._reachable.wait()
                await asyncio.sleep(self._rng.uniform(0, SPREAD_S))
            desired = self._desired.get(entry_id)
            if desired is None:
                continue
            if (delay_s := desired.not_before_s - self._clock()) > 0:
                again = (urgency, next(self._numbers), entry_id)
                asyncio.get_running_loop().call_later(delay_s, self._queue.put_nowait, again)
                continue
            try:
                await self._write(entry_id, desired)
            except ServiceError as problem:
                self._on_failure(entry_id, desired, problem)
            else:
                backoff.reset()
                continue
            # The id stays marked as queued during the backoff, so that no other writer takes it.
            await asyncio.sleep(backoff.next_s())
            self._queue.put_nowait((urgency, next(self._numbers), entry_id))

    async def _write(self, entry_id: str, desired: _Desired) -> None:
        """Write until the agent's entry is the desired one: it may change during a write."""
        while True:
            version, record = desired.version, desired.record
            if record is not None:
                await self._client.register(record, desired.health)
            elif await self._client.owner_of(entry_id) == self._replica_id:
                # Checked because another replica at this agent may have adopted the entry since.
                await self._client.deregister(entry_id)
            desired.written_version, desired.written_s = version, self._clock()
            for wanted, waiter in desired.waiters:
                if wanted <= version and not waiter.done():
                    waiter.set_result(None)
            desired.waiters = [(wanted, waiter) for wanted, waiter in desired.waiters if not waiter.done()]
            if desired.version == version:
                break
        desired.is_queued = False
        if desired.record is None and self._desired.get(entry_id) is desired:
            del self._desired[entry_id]

    def _on_failure(self, entry_id: str, desired: _Desired, error: ServiceError) -> None:
        """Log a repeated error once, and fail the callers that wait for a write that Consul rejects."""
        if not is_refusal(error):
            log.debug("writing %s to Consul failed, retrying: %s", entry_id, error)
            return
        if str(error) != self._logged_error:
            log.error("Consul rejected the write of %s, retrying: %s", entry_id, error)
            self._logged_error = str(error)
        for _, waiter in desired.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        desired.waiters = []
