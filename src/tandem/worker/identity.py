"""The worker's identity and epoch: a process pause that outlives the lease takes a new epoch, and so does a new role.

A process that was stopped, swapped out or suspended for longer than its lease may have been declared dead meanwhile.
Calls still queued in its sockets were sent to the expired incarnation, so they are rejected with STALE_EPOCH: every
read of the identity checks the clock first, and a heartbeat reads it when no call does. An outage of the registry is
not a pause and never changes the epoch. Open legs stay open: each belongs to its frontend's step stream, and a frontend
that has given up on a leg has aborted it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from tandem.clock import Clock, epoch_now, since_boot
from tandem.discovery import LeaseTime
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker

log = logging.getLogger(__name__)

BEAT_S = 0.2
PAUSE_FRACTION = 0.5
"""Fraction of the lease's TTL. A renewed lease has at least two thirds left, so only a longer pause can expire it."""


class Leased(Protocol):
    """The part of `tandem.discovery.registration` that pause detection needs."""

    @property
    def lease_time(self) -> LeaseTime | None:
        """The current lease; None while not registered."""
        ...

    @property
    def ttl_s(self) -> float:
        """TTL of a lease, in seconds."""
        ...

    def renew(self, epoch: int) -> None:
        """Register again with a new epoch."""
        ...

    def replace(self, member: Worker) -> None:
        """Register again as another description of the same worker."""
        ...

    async def set_adapters(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        """Report other adapters; returns whether a registry has confirmed them in time."""
        ...


class Identity:
    """The worker's description with its current epoch."""

    def __init__(
        self, worker: Worker, lease: Leased, *, clock: Clock = since_boot, new_epoch: Callable[[], int] = epoch_now
    ) -> None:
        self._worker = worker
        self._registration = lease
        self._clock = clock
        self._new_epoch = new_epoch
        self._ran_s = clock()
        """When this process was last observed to be running."""

    def current(self) -> Worker:
        """The worker with its current epoch; checks for a pause first."""
        now_s = self._clock()
        ran_s, self._ran_s = self._ran_s, now_s
        if self._has_lost_lease(ran_s, now_s):
            self._renew_after_pause(now_s - ran_s)
        return self._worker

    def supersede(self, epoch: int) -> None:
        """Take an epoch above that of a previous incarnation, even when the system clock has moved backwards."""
        self._take_epoch(max(epoch + 1, self._new_epoch()))

    def become(self, worker: Worker, loaded: Collection[Adapter]) -> Worker:
        """Take this description under a later epoch, and of the present adapters those that are still loaded.

        Returns the worker with it.
        """
        epoch = max(self.current().epoch + 1, self._new_epoch())
        adapters = tuple(adapter for adapter in self._worker.adapters if adapter in loaded)
        self._worker = replace(worker, epoch=epoch, adapters=adapters)
        self._registration.replace(self._worker)
        return self._worker

    async def serve(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        """Take other adapters, in the same epoch. Returns whether a registry has confirmed them in time."""
        self._worker = replace(self.current(), adapters=adapters)
        return await self._registration.set_adapters(adapters, timeout_s)

    async def beat(self) -> None:
        """Check for pauses until cancelled, so that a new epoch is registered even when no call arrives."""
        while True:
            self.current()
            await asyncio.sleep(BEAT_S)

    def _has_lost_lease(self, ran_s: float, now_s: float) -> bool:
        """Whether the process paused between the two times for long enough to lose its lease."""
        pause_s, ttl_s, lease = now_s - ran_s, self._registration.ttl_s, self._registration.lease_time
        if pause_s > ttl_s:
            return True
        # A lease that expired before the pause began expired in a registry outage, not because of the pause.
        return lease is not None and pause_s > ttl_s * PAUSE_FRACTION and ran_s < lease.end_s <= now_s

    def _renew_after_pause(self, pause_s: float) -> None:
        former = self._worker.epoch
        self._take_epoch(max(former + 1, self._new_epoch()))
        log.warning(
            "process was paused for %.1f s, longer than its lease: epoch %d replaces %d; registering again",
            pause_s,
            self._worker.epoch,
            former,
        )

    def _take_epoch(self, epoch: int) -> None:
        self._worker = replace(self._worker, epoch=epoch)
        self._registration.renew(epoch)
