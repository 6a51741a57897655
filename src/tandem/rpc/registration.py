"""A worker's place in the registry: enters it, keeps its lease, and comes back by itself when the registry was gone.

Owns one task and the calls Register, KeepAlive and Deregister. Does not decide when a worker may register (after its
canary), when it needs a new epoch (`tandem.worker.identity`) or what it does when it was replaced (it ends): it tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.errors import DuplicateWorker, InvalidRequest, ServiceError, TandemError, WorkerNotFound
from tandem.model.worker import Worker, WorkerState
from tandem.rpc.address_book import AddressBook
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.messages import STATES, worker_to_proto
from tandem.rpc.status import from_rpc_error
from tandem.runtime.clock import Clock, since_boot
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 3.0
DEREGISTER_TIMEOUT_S = 1.0
LEASE_TTL_MS = 5_000
"""Of a registry that does not say how long its leases live."""
ANSWER_MIN_S = 0.5
"""However short a lease is, a loaded registry gets this long to answer a sign of life."""
SPREAD_MAX_S = 1.0
SPREAD_FRACTION = 0.2
"""Of a lease's time. When a registry goes or comes, its whole fleet knows it at once: each waits a part of this."""


@dataclass(frozen=True, slots=True)
class LeaseTime:
    """How long leases live, and when the present one ends unless it is kept: never later than the registry ends it."""

    ttl_s: float
    end_s: float


@dataclass(slots=True)
class _Lease:
    lease_id: str
    epoch: int
    ttl_s: float
    end_s: float
    told_state: WorkerState


class Registration:
    """Keeps one start of one worker registered from `start` to `close`."""

    def __init__(
        self,
        addresses: Sequence[str],
        worker: Worker,
        *,
        tls: Tls | None = None,
        clock: Clock = since_boot,
        rng: random.Random | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            addresses: of registries, as settings have them; another one is tried when one fails.
            worker: what is registered.
            tls: what the worker presents to a registry that asks for certificates.
            clock: for the lease's end as seen from here.
            rng: spreads reconnections.
        """
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._book = AddressBook(addresses, clock=clock, rng=self._rng)
        self._worker = worker
        self._held_epoch = worker.epoch
        """Of the last lease, or of the first one to be: whoever has a later one has taken this worker's place."""
        self._clock = clock
        self._backoff = Backoff(rng=self._rng)
        self._ttl_s = LEASE_TTL_MS / 1_000
        self._channels = Channels(tls)
        self._lease: _Lease | None = None
        self._granted = asyncio.Event()
        self._state_told = asyncio.Event()
        self._wake = asyncio.Event()
        self._is_outage_told = False
        self._is_heard = False
        """Whether the last thing a registry was told was answered."""
        self._refused_since_s: float | None = None
        """Since when somebody else has held this worker's id or address."""
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
        """Return as soon as a registry holds the worker. Bound it with asyncio.timeout: when fenced, it never does."""
        await self._granted.wait()

    async def start(self) -> None:
        """Begin; returns at once, whether or not a registry can be reached."""
        assert self._task is None, "start() twice"
        self._task = asyncio.create_task(self._run(), name="registration")

    async def set_state(self, state: WorkerState, timeout_s: float = 1.0) -> bool:
        """Tell the registry where the worker is in its life. Returns whether it answered within `timeout_s`.

        If not, it is told as soon as it can be reached again.
        """
        if state is not self._worker.state:
            self._worker = replace(self._worker, state=state)
            self._state_told.clear()
            self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._state_told.wait()
        return self._state_told.is_set()

    def renew(self, epoch: int) -> None:
        """Register anew, at once, as a new start of the same worker; its former lease is nothing to it any more."""
        self._worker = replace(self._worker, epoch=epoch)
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
            request = pb.DeregisterRequest(lease_id=lease.lease_id)
            try:
                await (await self._stub()).Deregister(request, timeout=DEREGISTER_TIMEOUT_S)
            except grpc.aio.AioRpcError as failure:
                log.info("not deregistered, the lease will run out: %s", from_rpc_error(failure))
            except ServiceError as problem:
                log.info("not deregistered, the lease will run out: %s", problem)
        await self._channels.close()

    async def _run(self) -> None:
        """Hold a lease for ever, or until the registry says that this worker's time is over."""
        while True:
            wait_s: float | None = None
            try:
                if self._lease is None:
                    await self._register()
                await self._keep_alive()
                continue
            except WorkerNotFound:
                # The registry was restarted, or did not hear of us for too long. It answers, so register soon.
                self._lose_lease()
                self._backoff.reset()
                wait_s = self._spread_s()
            except InvalidRequest as problem:
                return self._fence(f"the registry refuses this worker: {problem}")
            except DuplicateWorker as problem:
                reason = self._lost_place(problem)
                if reason is not None:
                    return self._fence(reason)
                # A dead start's lease, or our own whose grant was lost on the way: it runs out by itself.
                log.info("waiting for a former lease to end: %s", problem)
            except TandemError as problem:
                if not self._is_outage_told:
                    log.warning("registry %s: %s; trying until it answers", self._book, problem)
                    self._is_outage_told = True
                self._book.failed()
                if self._is_heard:
                    wait_s = self._spread_s()
                self._is_heard = False
            await asyncio.sleep(self._backoff.next_s() if wait_s is None else wait_s)

    def _spread_s(self) -> float:
        """A wait after which the fleet of a registry that went or came does not call in one moment."""
        return self._rng.uniform(0.0, min(SPREAD_MAX_S, self._ttl_s * SPREAD_FRACTION))

    def _lost_place(self, problem: DuplicateWorker) -> str | None:
        """Why a refusal is final; None when the place may become free."""
        facts = problem.metadata
        epoch = int(facts.get("epoch", "0"))
        is_own = epoch == self._worker.epoch and facts.get("address") == self._worker.address
        if epoch > self._held_epoch and not is_own:
            return f"replaced by a newer start: {problem}"
        if self._has_outlived_a_lease(problem):
            return f"another live process has this worker's place: {problem}"
        return None

    def _has_outlived_a_lease(self, problem: DuplicateWorker) -> bool:
        """Whether refusals have gone on for longer than a lease lives that nobody keeps alive."""
        now_s = self._clock()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        lease_ttl_s = int(problem.metadata.get("lease_ttl_ms", LEASE_TTL_MS)) / 1_000
        # The registry gives half a lease more after a pause of its own.
        return now_s - self._refused_since_s > 1.5 * lease_ttl_s

    async def _register(self) -> None:
        worker, asked_s = self._worker, self._clock()
        request = pb.RegisterRequest(worker=worker_to_proto(worker))
        try:
            response = await (await self._stub()).Register(request, timeout=REGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        self._ttl_s = _seconds(response.time_to_live)
        if worker.epoch != self._worker.epoch:
            # It needed a new epoch while the registry granted the former one a lease.
            return
        self._lease = _Lease(response.lease_id, worker.epoch, self._ttl_s, asked_s + self._ttl_s, worker.state)
        self._held_epoch = worker.epoch
        log.info("registered as %s of epoch %d with %s", worker.worker_id, worker.epoch, self._book)
        self._granted.set()
        self._refused_since_s = None
        self._answered()

    async def _keep_alive(self) -> None:
        """Give signs of life over one stream until it breaks, which is an error, or until the lease is given up."""
        lease = self._lease
        if lease is None:
            return
        call = (await self._stub()).KeepAlive()
        # A registry that goes away is noticed at once, not at the next sign of life.
        call.add_done_callback(lambda _: self._wake.set())
        try:
            while self._lease is lease:
                self._wake.clear()
                await self._exchange(call, lease)
                self._backoff.reset()
                if self._lease is lease:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(lease.ttl_s / 3):
                            await self._wake.wait()
        except TimeoutError:
            raise ServiceError("no answer to a sign of life") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    async def _exchange(self, call: Any, lease: _Lease) -> None:
        """One sign of life and its answer. It says the state only when the registry has not heard it yet."""
        request, state, asked_s = pb.KeepAliveRequest(lease_id=lease.lease_id), self._worker.state, self._clock()
        if state is not lease.told_state:
            request.state = STATES[state]
        async with asyncio.timeout(max(lease.ttl_s / 3, ANSWER_MIN_S)):
            # A stream that has ended refuses the write; the read then raises what it ended with.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(request)
            answer = await call.read()
        if not isinstance(answer, pb.KeepAliveResponse):
            raise ServiceError("the registry ended the stream")
        self._ttl_s = lease.ttl_s = _seconds(answer.time_to_live)
        # From the asking: while the answer came, the registry's own clock ran.
        lease.end_s, lease.told_state = asked_s + lease.ttl_s, state
        self._answered()

    def _answered(self) -> None:
        self._is_outage_told = False
        self._is_heard = True
        if self._lease is not None and self._lease.told_state is self._worker.state:
            self._state_told.set()

    def _lose_lease(self) -> None:
        self._lease = None
        self._granted.clear()
        self._state_told.clear()

    def _fence(self, reason: str) -> None:
        log.error("%s", reason)
        self._lose_lease()
        self._fenced = reason
        self._is_fenced.set()

    async def _stub(self) -> Any:
        return RegistryServiceStub(self._channels.get(await self._book.current()))


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
