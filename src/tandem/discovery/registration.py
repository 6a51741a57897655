"""A member's place in the registry: enters it, keeps its lease, and comes back by itself when the registry was gone.

Owns one task and the order of its calls (`tandem.discovery.lease_calls`). Does not decide when a worker may register
(after its canary), when it needs a new epoch (`tandem.worker.identity`) or what it does when it was replaced (it ends):
it reports.
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
from tandem.discovery.lease_calls import Lease, LeaseTime, SignsOfLife, give_up, grant
from tandem.domain.frontend import Member
from tandem.domain.worker import WorkerState
from tandem.errors import DuplicateWorker, InvalidRequest, TandemError, WorkerNotFound
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

LEASE_TTL_MS = 5_000
"""Of a registry that does not say how long its leases live."""
ANSWER_MIN_S = 0.5
"""However short a lease is, a loaded registry gets this long to answer a sign of life."""
SPREAD_MAX_S = 1.0
SPREAD_FRACTION = 0.2
"""Of a lease's time. When a registry goes or comes, its whole fleet knows it at once: each waits a part of this."""


class Registration:
    """Keeps one start of one worker or frontend registered from `start` to `close`."""

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
            addresses: of registries, as settings have them; another one is tried when one fails.
            member: what is registered.
            tls: what it presents to a registry that asks for certificates.
            may_be_fenced: whether it gives up for good where its place is lost; else it goes on trying.
            clock: for the lease's end as seen from here.
            rng: spreads reconnections.
        """
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._book = AddressBook(addresses, clock=clock, rng=self._rng)
        self._member = member
        self._held_epoch: int | None = None
        """Of the last lease: whoever has a later one has taken this member's place. None: it never had one."""
        self._supersede: Callable[[int], None] = lambda epoch: self.renew(epoch + 1)
        self._may_be_fenced = may_be_fenced
        self._clock = clock
        self._backoff = Backoff(rng=self._rng)
        self._channels = Channels(tls)
        self._lease: Lease | None = None
        self._ttl_s = LEASE_TTL_MS / 1_000
        self._granted = asyncio.Event()
        self._state_told = asyncio.Event()
        self._wake = asyncio.Event()
        self._is_trouble_told = False
        self._is_heard = False
        """Whether the last thing a registry was told was answered."""
        self._refused_since_s: float | None = None
        """Since when somebody else has held this member's id or address."""
        self._fenced: str | None = None
        self._is_fenced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def registered(self) -> bool:
        """Whether a registry confirmed the lease within its time to live."""
        return self._lease is not None and self._clock() < self._lease.end_s

    @property
    def lease_time(self) -> LeaseTime | None:
        """Of the present lease, also when it has ended without the registry's saying so; None without one."""
        return None if self._lease is None else LeaseTime(self._lease.ttl_s, self._lease.end_s)

    @property
    def ttl_s(self) -> float:
        """How long leases live, as far as is known."""
        return self._ttl_s

    @property
    def fenced(self) -> str | None:
        """Why this process must end (another start has its place, or no registry will ever take it); else None."""
        return self._fenced

    async def wait_fenced(self) -> str:
        """Return `fenced` as soon as there is a reason; never returns otherwise."""
        await self._is_fenced.wait()
        assert self._fenced is not None
        return self._fenced

    async def wait_registered(self) -> None:
        """Return as soon as a registry holds the member. Bound it with asyncio.timeout: when fenced, it never does."""
        await self._granted.wait()

    async def start(self) -> None:
        """Begin; returns at once, whether or not a registry can be reached."""
        assert self._task is None, "start() twice"
        self._task = asyncio.create_task(self._run(), name="registration")

    async def set_state(self, state: WorkerState, timeout_s: float = 1.0) -> bool:
        """Tell the registry where the member is in its life. Returns whether it answered within `timeout_s`.

        If not, it is told as soon as it can be reached again.
        """
        if state is not self._member.state:
            self._member = replace(self._member, state=state)
            self._state_told.clear()
            self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._state_told.wait()
        return self._state_told.is_set()

    def when_superseded(self, supersede: Callable[[int], None]) -> None:
        """Have somebody else renew it where a start of before has a later epoch; by default it does so itself.

        `supersede` is given that epoch, and calls `renew` with a later one.
        """
        self._supersede = supersede

    def renew(self, epoch: int) -> None:
        """Register anew, at once, as a new start of the same member; its former lease is nothing to it any more."""
        self._member = replace(self._member, epoch=epoch)
        self._lose_lease()
        self._wake.set()

    async def close(self) -> None:
        """Leave the registry, trying for at most a second, and free everything. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        lease, self._lease = self._lease, None
        self._granted.clear()
        if lease is not None and self._fenced is None:
            try:
                await give_up(await self._channel(), lease)
            except TandemError as problem:
                log.info("not deregistered, the lease will run out: %s", problem)
        await self._channels.close()

    async def _run(self) -> None:
        """Hold a lease for ever, or until the registry says that this member's time is over."""
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
        """How long to wait after a failure; None: this member's time is over."""
        was_heard, self._is_heard = self._is_heard, False
        if isinstance(problem, WorkerNotFound):
            # The registry was restarted, or did not hear of us for too long. It answers, so register soon.
            self._lose_lease()
            self._backoff.reset()
            return self._spread_s()
        if isinstance(problem, InvalidRequest | DuplicateWorker):
            return self._after_refusal(problem)
        self._tell(f"registry {self._book}: {problem}; trying until it answers")
        self._book.failed()
        return self._spread_s() if was_heard else self._backoff.next_s()

    def _after_refusal(self, problem: InvalidRequest | DuplicateWorker) -> float | None:
        later_epoch = self._later_epoch_of_before(problem)
        if later_epoch is not None:
            log.warning("a start of before was epoch %d: this machine's clock has gone back", later_epoch)
            self._supersede(later_epoch)
            return 0.0
        reason = self._final(problem)
        if reason is None:
            # A dead start's lease, or our own whose grant was lost on the way: it runs out by itself.
            log.info("waiting for a former lease to end: %s", problem)
            return self._backoff.next_s()
        if self._may_be_fenced:
            log.error("%s", reason)
            self._lose_lease()
            self._fenced = reason
            self._is_fenced.set()
            return None
        self._tell(f"{reason}; trying until it is taken")
        return self._ttl_s

    def _final(self, problem: InvalidRequest | DuplicateWorker) -> str | None:
        """Why there is no hope for this member; None when its place may become free."""
        if isinstance(problem, InvalidRequest):
            return f"the registry refuses this {self._member.kind}: {problem}"
        facts = problem.metadata
        epoch = int(facts.get("epoch", "0"))
        # Who never had a place cannot have lost it: its clock may have gone back, and the other's lease may run out.
        if self._held_epoch is not None and epoch > self._held_epoch and not self._is_own(problem):
            return f"replaced by a newer start: {problem}"
        if self._has_outlived_a_lease(problem):
            return f"another live process has this {self._member.kind}'s place: {problem}"
        return None

    def _later_epoch_of_before(self, problem: InvalidRequest | DuplicateWorker) -> int | None:
        """The epoch of a start of before, where it is what stands in the way of this one's first lease; else None.

        Only this process can listen at its own address, so what is listed there is dead. That is not so once this one
        has had a lease: then somebody has taken its address, and two that outran each other would never end.
        """
        if self._held_epoch is not None or not isinstance(problem, DuplicateWorker) or not self._is_own(problem):
            return None
        epoch = int(problem.metadata.get("epoch", "0"))
        return epoch if epoch >= self._member.epoch else None

    def _is_own(self, problem: InvalidRequest | DuplicateWorker) -> bool:
        return problem.metadata.get("address") == self._member.address

    def _has_outlived_a_lease(self, problem: DuplicateWorker) -> bool:
        """Whether refusals have gone on for longer than a lease lives that nobody keeps alive."""
        now_s = self._clock()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        lease_ttl_s = int(problem.metadata.get("lease_ttl_ms", LEASE_TTL_MS)) / 1_000
        # The registry gives half a lease more after a pause of its own.
        return now_s - self._refused_since_s > 1.5 * lease_ttl_s

    def _spread_s(self) -> float:
        """A wait after which the fleet of a registry that went or came does not call in one moment."""
        return self._rng.uniform(0.0, min(SPREAD_MAX_S, self._ttl_s * SPREAD_FRACTION))

    async def _register(self) -> None:
        member = self._member
        lease = await grant(await self._channel(), member, self._clock())
        self._ttl_s = lease.ttl_s
        if member.epoch != self._member.epoch:
            # It needed a new epoch while the registry granted the former one a lease.
            return
        self._lease, self._held_epoch = lease, member.epoch
        log.info("registered as %s of epoch %d with %s", member.member_id, member.epoch, self._book)
        self._granted.set()
        self._refused_since_s = None
        self._answered(lease)

    async def _keep_alive(self) -> None:
        """Give signs of life over one stream until it breaks, which is an error, or until the lease is given up."""
        lease = self._lease
        if lease is None:
            return
        signs = SignsOfLife(await self._channel(), lease, self._wake)
        try:
            while self._lease is lease:
                self._wake.clear()
                await signs.give(self._member.state, self._clock(), max(lease.ttl_s / 3, ANSWER_MIN_S))
                if self._lease is lease:
                    self._answered(lease)
                    await self._pause(lease.ttl_s / 3)
        finally:
            signs.close()

    async def _pause(self, seconds: float) -> None:
        """Wait, but not when there is something to say or the stream has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _answered(self, lease: Lease) -> None:
        self._ttl_s = lease.ttl_s
        self._backoff.reset()
        self._is_trouble_told = False
        self._is_heard = True
        if lease.told_state is self._member.state:
            self._state_told.set()

    def _tell(self, trouble: str) -> None:
        """One line for one trouble, however often it is met."""
        if not self._is_trouble_told:
            log.warning("%s", trouble)
            self._is_trouble_told = True

    def _lose_lease(self) -> None:
        self._lease = None
        self._granted.clear()
        self._state_told.clear()

    async def _channel(self) -> grpc.aio.Channel:
        return self._channels.get(await self._book.current())
