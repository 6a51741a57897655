"""A member's registration: registers it, renews its lease, and registers again after an outage of the registry.

Owns one task and the order of its calls (`tandem.discovery.lease_calls`). Does not decide when a worker may register
(after its canary), when it needs a new epoch (`tandem.worker.identity`) or what a fenced worker does (it exits): it
only reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc

from tandem.clock import Clock, since_boot
from tandem.discovery.address_book import AddressBook
from tandem.discovery.lease_calls import KeepAliveStream, Lease, LeaseTime, give_up, grant
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import WorkerState
from tandem.errors import DuplicateWorker, InvalidRequest, TandemError, WorkerNotFound
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

LEASE_TTL_MS = 5_000
"""Time to live of a lease, where the registry does not state it."""
RESPONSE_TIMEOUT_MIN_S = 0.5
"""Minimum timeout of a keep-alive, also for short leases: a loaded registry may need it."""
SPREAD_MAX_S = 1.0
SPREAD_FRACTION = 0.2
"""Of a lease's time to live. When a registry stops or starts, all members notice at once: jitter spreads their calls.
"""


class Registration:
    """Keeps one worker or frontend registered from `start` to `close`."""

    def __init__(
        self,
        addresses: Sequence[str],
        member: Member,
        *,
        tls: Tls | None = None,
        may_be_fenced: bool = True,
        clock: Clock = since_boot,
        rng: random.Random | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            addresses: of registries, in the format of the settings; the next one is tried when one fails.
            member: the worker or frontend to register.
            tls: client certificate for a registry that requires one.
            may_be_fenced: whether it stops for good when another member has its id or address; else it retries.
            clock: for the end of the lease, in seconds.
            rng: jitter of reconnections.
        """
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._book = AddressBook(addresses, clock=clock, rng=self._rng)
        self._member = member
        self._held_epoch: int | None = None
        """Epoch of the last lease: a member with a later one has replaced this one. None: it never had a lease."""
        self._supersede: Callable[[int], None] = lambda epoch: self.renew(epoch + 1)
        self._may_be_fenced = may_be_fenced
        self._clock = clock
        self._backoff = Backoff(rng=self._rng)
        self._channels = Channels(tls)
        self._lease: Lease | None = None
        self._ttl_s = LEASE_TTL_MS / 1_000
        self._granted = asyncio.Event()
        self._state_reported = asyncio.Event()
        self._wake = asyncio.Event()
        self._is_failure_logged = False
        self._was_answered = False
        """Whether the last call to a registry succeeded."""
        self._rejected_since_s: float | None = None
        """Since when another member has held this one's id or address."""
        self._fenced: str | None = None
        self._is_fenced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def registered(self) -> bool:
        """Whether a registry confirmed the lease within its time to live."""
        return self._lease is not None and self._clock() < self._lease.end_s

    @property
    def lease_time(self) -> LeaseTime | None:
        """Of the current lease, also when it has expired without a report of the registry; None without one."""
        return None if self._lease is None else LeaseTime(self._lease.ttl_s, self._lease.end_s)

    @property
    def ttl_s(self) -> float:
        """Time to live of a lease, as last stated by a registry."""
        return self._ttl_s

    @property
    def fenced(self) -> str | None:
        """Why this process must exit (another process replaced it, or the registry rejects it for good); else None."""
        return self._fenced

    async def wait_fenced(self) -> str:
        """Return the reason once fenced; never returns otherwise."""
        await self._is_fenced.wait()
        assert self._fenced is not None
        return self._fenced

    async def wait_registered(self) -> None:
        """Return once the member is registered. Bound it with asyncio.timeout: when fenced, it never returns."""
        await self._granted.wait()

    async def start(self) -> None:
        """Start the task; returns at once, whether or not a registry is reachable."""
        assert self._task is None, "start() twice"
        self._task = asyncio.create_task(self._run(), name="registration")

    async def set_state(self, state: WorkerState, timeout_s: float = 1.0) -> bool:
        """Report the member's state to the registry. Returns whether the registry confirmed it within `timeout_s`.

        If not, it is reported as soon as a registry is reachable.
        """
        if state is not self._member.state:
            self._member = replace(self._member, state=state)
            self._state_reported.clear()
            self._wake.set()
        return await self._wait_reported(timeout_s)

    async def set_adapters(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        """Report a worker's adapters to the registry, in the same epoch; returns as `set_state`."""
        assert not isinstance(self._member, Frontend), "frontends have no adapters"
        if adapters != self._member.adapters:
            self._member = replace(self._member, adapters=adapters)
            self._state_reported.clear()
            self._wake.set()
        return await self._wait_reported(timeout_s)

    async def _wait_reported(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._state_reported.wait()
        return self._state_reported.is_set()

    def when_superseded(self, supersede: Callable[[int], None]) -> None:
        """Set what happens when a previous incarnation has a later epoch; by default `renew` with the next epoch.

        `supersede` gets that epoch, and must call `renew` with a later one.
        """
        self._supersede = supersede

    def renew(self, epoch: int) -> None:
        """Register again, at once, as a new incarnation of the same member; the previous lease is dropped."""
        self._member = replace(self._member, epoch=epoch)
        self._lose_lease()
        self._wake.set()

    def replace(self, member: Member) -> None:
        """Register again, at once, as another description of the same member under a later epoch."""
        assert (member.kind, member.member_id) == (self._member.kind, self._member.member_id), "another member"
        self._member = member
        self._lose_lease()
        self._wake.set()

    async def close(self) -> None:
        """Deregister, within at most a second, and free all resources. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        lease, self._lease = self._lease, None
        self._granted.clear()
        if lease is not None and self._fenced is None:
            try:
                await give_up(await self._channel(), lease)
            except TandemError as problem:
                log.info("could not deregister, the lease will expire: %s", problem)
        await self._channels.close()

    async def _run(self) -> None:
        """Hold a lease until fenced or cancelled."""
        wait_s: float | None = 0.0
        while wait_s is not None:
            try:
                if self._lease is None:
                    await self._register()
                await self._keep_alive()
            except TandemError as problem:
                wait_s = self._after(problem)
                await asyncio.sleep(wait_s or 0.0)

    def _after(self, problem: TandemError) -> float | None:
        """Seconds to wait after a failure; None: this member is fenced."""
        was_answered, self._was_answered = self._was_answered, False
        if isinstance(problem, WorkerNotFound):
            # The registry was restarted, or the lease expired. It is reachable, so register again soon.
            self._lose_lease()
            self._backoff.reset()
            return self._spread_s()
        if isinstance(problem, InvalidRequest | DuplicateWorker):
            return self._after_rejection(problem)
        self._log_failure(f"registry {self._book}: {problem}; retrying until it responds")
        self._book.failed()
        return self._spread_s() if was_answered else self._backoff.next_s()

    def _after_rejection(self, problem: InvalidRequest | DuplicateWorker) -> float | None:
        later_epoch = self._later_own_epoch(problem)
        if later_epoch is not None:
            log.warning(
                "system clock moved backwards: a previous start of this %s has epoch %d; registering with a later one",
                self._member.kind,
                later_epoch,
            )
            self._supersede(later_epoch)
            return 0.0
        reason = self._final(problem)
        if reason is None:
            # The lease of a dead incarnation, or our own whose grant was lost in transit: it will expire.
            log.info("waiting for a previous lease to expire: %s", problem)
            return self._backoff.next_s()
        if self._may_be_fenced:
            log.error("%s", reason)
            self._lose_lease()
            self._fenced = reason
            self._is_fenced.set()
            return None
        self._log_failure(f"{reason}; retrying every {self._ttl_s:g} s")
        return self._ttl_s

    def _final(self, problem: InvalidRequest | DuplicateWorker) -> str | None:
        """Why retrying is useless; None when the conflicting lease may still expire."""
        if isinstance(problem, InvalidRequest):
            return f"the registry rejects this {self._member.kind}: {problem}"
        epoch = int(problem.metadata.get("epoch", "0"))
        # A member that never had a lease cannot have been replaced: its clock may be wrong, and the other lease expire.
        if self._held_epoch is not None and epoch > self._held_epoch and not self._is_own(problem):
            return f"replaced by a newer start of this {self._member.kind}: {problem}"
        if self._has_outlived_a_lease(problem):
            return f"another live process has this {self._member.kind}'s id or address: {problem}"
        return None

    def _later_own_epoch(self, problem: InvalidRequest | DuplicateWorker) -> int | None:
        """The later epoch of a previous incarnation, if that is what prevents this one's first lease; else None.

        Only one process can listen at an address, so another incarnation listed at this address is dead. That no longer
        holds once this process has had a lease: then another process has taken over its address, and two processes that
        superseded each other would never stop.
        """
        if self._held_epoch is not None or not isinstance(problem, DuplicateWorker) or not self._is_own(problem):
            return None
        epoch = int(problem.metadata.get("epoch", "0"))
        return epoch if epoch >= self._member.epoch else None

    def _is_own(self, problem: InvalidRequest | DuplicateWorker) -> bool:
        return problem.metadata.get("address") == self._member.address

    def _has_outlived_a_lease(self, problem: DuplicateWorker) -> bool:
        """Whether rejections have lasted longer than a lease without keep-alives could live."""
        now_s = self._clock()
        if self._rejected_since_s is None:
            self._rejected_since_s = now_s
        lease_ttl_s = int(problem.metadata.get("lease_ttl_ms", LEASE_TTL_MS)) / 1_000
        # A registry that was paused extends leases by half their time to live.
        return now_s - self._rejected_since_s > 1.5 * lease_ttl_s

    def _spread_s(self) -> float:
        """A random wait, so that the members of a registry that stopped or started do not call all at once."""
        return self._rng.uniform(0.0, min(SPREAD_MAX_S, self._ttl_s * SPREAD_FRACTION))

    async def _register(self) -> None:
        member = self._member
        lease = await grant(await self._channel(), member, self._clock())
        self._ttl_s = lease.ttl_s
        if member.epoch != self._member.epoch:
            # `renew` changed the epoch during the call: this lease is of the previous epoch.
            return
        self._lease, self._held_epoch = lease, member.epoch
        log.info(
            "registered %s %s (epoch %d) with registry %s", member.kind, member.member_id, member.epoch, self._book
        )
        self._granted.set()
        self._rejected_since_s = None
        self._confirmed(lease)

    async def _keep_alive(self) -> None:
        """Renew the lease over one stream until the stream breaks, which raises, or until the lease is dropped."""
        lease = self._lease
        if lease is None:
            return
        stream = KeepAliveStream(await self._channel(), lease, self._wake)
        try:
            while self._lease is lease:
                self._wake.clear()
                await stream.send(self._member, self._clock(), max(lease.ttl_s / 3, RESPONSE_TIMEOUT_MIN_S))
                if self._lease is lease:
                    self._confirmed(lease)
                    await self._pause(lease.ttl_s / 3)
        finally:
            stream.close()

    async def _pause(self, seconds: float) -> None:
        """Wait until the next keep-alive is due, or something must be reported or the stream has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _confirmed(self, lease: Lease) -> None:
        self._ttl_s = lease.ttl_s
        self._backoff.reset()
        self._is_failure_logged = False
        self._was_answered = True
        if lease.has(self._member):
            self._state_reported.set()

    def _log_failure(self, message: str) -> None:
        """Log the first failure only, until the next success."""
        if not self._is_failure_logged:
            log.warning("%s", message)
            self._is_failure_logged = True

    def _lose_lease(self) -> None:
        self._lease = None
        self._granted.clear()
        self._state_reported.clear()

    async def _channel(self) -> grpc.aio.Channel:
        return self._channels.get(await self._book.current())
