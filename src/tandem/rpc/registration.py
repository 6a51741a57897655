"""A worker's place in the registry: enters it, keeps its lease, and comes back by itself when the registry was gone.

Owns one task and the calls Register, KeepAlive and Deregister. Does not decide when a worker may register (after its
canary) or what it does when it was replaced (it ends): it tells.
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
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.messages import STATES, worker_to_proto
from tandem.rpc.status import from_rpc_error
from tandem.runtime.clock import Clock, monotonic
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 3.0
DEREGISTER_TIMEOUT_S = 1.0
LEASE_TTL_MS = 5_000
"""Of a registry that does not say how long its leases live."""
ANSWER_MIN_S = 0.5
"""However short a lease is, a loaded registry gets this long to answer a sign of life."""


@dataclass(slots=True)
class _Lease:
    lease_id: str
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
        clock: Clock = monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            addresses: host:port of each registry; the next one is tried when one fails.
            worker: what is registered.
            tls: what the worker presents to a registry that asks for certificates.
            clock: for the lease's end as seen from here.
            rng: spreads reconnections.
        """
        assert addresses, "a registration needs the address of a registry"
        self._addresses = tuple(addresses)
        self._attempt = 0
        self._worker = worker
        self._clock = clock
        self._backoff = Backoff(rng=rng)
        self._channels = Channels(tls)
        self._lease: _Lease | None = None
        self._granted = asyncio.Event()
        self._state_told = asyncio.Event()
        self._wake = asyncio.Event()
        self._is_outage_told = False
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
                await self._stub().Deregister(request, timeout=DEREGISTER_TIMEOUT_S)
            except grpc.aio.AioRpcError as failure:
                log.info("not deregistered, the lease will run out: %s", from_rpc_error(failure))
        await self._channels.close()

    async def _run(self) -> None:
        """Hold a lease for ever, or until the registry says that this worker's time is over."""
        while True:
            try:
                if self._lease is None:
                    await self._register()
                await self._keep_alive()
            except WorkerNotFound:
                # The registry was restarted, or did not hear of us for too long. It answers, so register soon; not at
                # once, because a whole fleet does so at this moment.
                self._lose_lease()
                self._backoff.reset()
            except InvalidRequest as problem:
                return self._fence(f"the registry refuses this worker: {problem}")
            except DuplicateWorker as problem:
                if int(problem.metadata.get("epoch", "0")) > self._worker.epoch:
                    return self._fence(f"replaced by a newer start: {problem}")
                if self._has_outlived_a_lease(problem):
                    return self._fence(f"another live process has this worker's place: {problem}")
                # A dead start's lease, or our own whose grant was lost on the way: it runs out by itself.
                log.info("waiting for a former lease to end: %s", problem)
            except TandemError as problem:
                if not self._is_outage_told:
                    log.warning("registry %s: %s; trying until it answers", self._address(), problem)
                    self._is_outage_told = True
                self._attempt += 1
            await asyncio.sleep(self._backoff.next_s())

    def _has_outlived_a_lease(self, problem: DuplicateWorker) -> bool:
        """Whether refusals have gone on for longer than a lease lives that nobody keeps alive."""
        now_s = self._clock()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        lease_ttl_s = int(problem.metadata.get("lease_ttl_ms", LEASE_TTL_MS)) / 1_000
        # The registry gives half a lease more after a pause of its own.
        return now_s - self._refused_since_s > 1.5 * lease_ttl_s

    async def _register(self) -> None:
        worker = self._worker
        request = pb.RegisterRequest(worker=worker_to_proto(worker))
        try:
            response = await self._stub().Register(request, timeout=REGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        ttl_s = _seconds(response.time_to_live)
        self._lease = _Lease(response.lease_id, ttl_s, self._clock() + ttl_s, worker.state)
        log.info("registered as %s of epoch %d with %s", worker.worker_id, worker.epoch, self._address())
        self._granted.set()
        self._refused_since_s = None
        self._answered()

    async def _keep_alive(self) -> None:
        """Give signs of life over one stream until it breaks, which is always an error."""
        lease = self._lease
        assert lease is not None
        call = self._stub().KeepAlive()
        # A registry that goes away is noticed at once, not at the next sign of life.
        call.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                self._wake.clear()
                await self._exchange(call, lease)
                self._backoff.reset()
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
        request, state = pb.KeepAliveRequest(lease_id=lease.lease_id), self._worker.state
        if state is not lease.told_state:
            request.state = STATES[state]
        async with asyncio.timeout(max(lease.ttl_s / 3, ANSWER_MIN_S)):
            # A stream that has ended refuses the write; the read then raises what it ended with.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(request)
            answer = await call.read()
        if not isinstance(answer, pb.KeepAliveResponse):
            raise ServiceError("the registry ended the stream")
        lease.ttl_s = _seconds(answer.time_to_live)
        lease.end_s, lease.told_state = self._clock() + lease.ttl_s, state
        self._answered()

    def _answered(self) -> None:
        self._is_outage_told = False
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

    def _address(self) -> str:
        return self._addresses[self._attempt % len(self._addresses)]

    def _stub(self) -> Any:
        return RegistryServiceStub(self._channels.get(self._address()))


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
