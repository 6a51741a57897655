"""Which start of its worker this process is: a pause that outlived its lease makes a new one of it, with a new epoch.

A process that was stopped, swapped out or suspended for longer than its lease may have been declared dead meanwhile.
What waits for it in its sockets was sent to a worker that no longer holds its place, so it is refused as STALE_EPOCH:
whoever asks for the present identity looks at the clock first, and a heartbeat asks when nobody else does. An outage of
the registry is no pause and never changes the epoch. Legs that are open stay open: each belongs to its caller's call,
which the caller has ended if it has given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from tandem.clock import Clock, epoch_now, since_boot
from tandem.discovery import LeaseTime
from tandem.domain.worker import Worker

log = logging.getLogger(__name__)

BEAT_S = 0.2
PAUSE_FRACTION = 0.5
"""Of a lease's time: a lease that is kept has two thirds left, so what ends it in a pause is longer than this."""


class Leased(Protocol):
    """A place in the registry, as far as a pause is concerned with it (`tandem.discovery.registration`)."""

    @property
    def lease_time(self) -> LeaseTime | None:
        """The present lease, if there is one."""
        ...

    @property
    def ttl_s(self) -> float:
        """How long leases live."""
        ...

    def renew(self, epoch: int) -> None:
        """Register anew with a new epoch."""
        ...


class Identity:
    """The worker as it is now."""

    def __init__(
        self, worker: Worker, place: Leased, *, clock: Clock = since_boot, new_epoch: Callable[[], int] = epoch_now
    ) -> None:
        self._worker = worker
        self._place = place
        self._clock = clock
        self._new_epoch = new_epoch
        self._ran_s = clock()
        """When this process was last seen to run."""

    def current(self) -> Worker:
        """The worker with its present epoch, after a look at the clock."""
        now_s = self._clock()
        ran_s, self._ran_s = self._ran_s, now_s
        if self._has_lost_lease(ran_s, now_s):
            self._begin_anew(now_s - ran_s)
        return self._worker

    def supersede(self, epoch: int) -> None:
        """Become a later start than one of before, whose epoch is later than a clock that went back can tell."""
        self._take_epoch(max(epoch + 1, self._new_epoch()))

    async def beat(self) -> None:
        """Look at the clock for ever; after a pause, the registry hears of the new epoch without a leg's coming."""
        while True:
            self.current()
            await asyncio.sleep(BEAT_S)

    def _has_lost_lease(self, ran_s: float, now_s: float) -> bool:
        """Whether the time between was a pause that a lease did not outlive, or would not have."""
        pause_s, ttl_s, lease = now_s - ran_s, self._place.ttl_s, self._place.lease_time
        if pause_s > ttl_s:
            return True
        # A lease that was over before the pause ended in an outage of the registry, while this process ran.
        return lease is not None and pause_s > ttl_s * PAUSE_FRACTION and ran_s < lease.end_s <= now_s

    def _begin_anew(self, pause_s: float) -> None:
        former = self._worker.epoch
        self._take_epoch(max(former + 1, self._new_epoch()))
        log.warning("this process did not run for %.1f s: epoch %d after %d", pause_s, self._worker.epoch, former)

    def _take_epoch(self, epoch: int) -> None:
        self._worker = replace(self._worker, epoch=epoch)
        self._place.renew(epoch)
