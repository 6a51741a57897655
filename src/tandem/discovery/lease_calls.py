"""The calls that enter a member at a registry and keep its lease: protobuf to values and back, failures as TandemError.

Knows that workers and frontends register by different calls; everything after that is the same for both. When to call
is `tandem.discovery.registration`.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import WorkerState
from tandem.errors import ServiceError
from tandem.rpc.convert import STATES, frontend_to_proto, worker_to_proto
from tandem.rpc.status import from_rpc_error

REGISTER_TIMEOUT_S = 3.0
DEREGISTER_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class LeaseTime:
    """How long leases live, and when the present one ends unless it is kept: never later than the registry ends it."""

    ttl_s: float
    end_s: float


@dataclass(slots=True)
class Lease:
    """A lease as its holder knows it."""

    lease_id: str
    ttl_s: float
    end_s: float
    told_state: WorkerState
    """Of its holder, as the registry has heard it."""


async def grant(channel: grpc.aio.Channel, member: Member, now_s: float) -> Lease:
    """Enter a member.

    Raises:
        TandemError: the registry refused, or did not answer.
    """
    stub: Any = RegistryServiceStub(channel)
    try:
        if isinstance(member, Frontend):
            frontend = pb.RegisterFrontendRequest(frontend=frontend_to_proto(member))
            granted = await stub.RegisterFrontend(frontend, timeout=REGISTER_TIMEOUT_S)
        else:
            worker = pb.RegisterRequest(worker=worker_to_proto(member))
            granted = await stub.Register(worker, timeout=REGISTER_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    ttl_s = _seconds(granted.time_to_live)
    return Lease(granted.lease_id, ttl_s, now_s + ttl_s, member.state)


async def give_up(channel: grpc.aio.Channel, lease: Lease) -> None:
    """Take its holder out.

    Raises:
        TandemError: the registry did not hear it.
    """
    stub: Any = RegistryServiceStub(channel)
    try:
        await stub.Deregister(pb.DeregisterRequest(lease_id=lease.lease_id), timeout=DEREGISTER_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None


class SignsOfLife:
    """One stream of signs of life for one lease. Close it in the end."""

    def __init__(self, channel: grpc.aio.Channel, lease: Lease, wake: asyncio.Event) -> None:
        """`wake` is set when the stream ends: a registry that goes away is noticed at once, not at the next sign."""
        stub: Any = RegistryServiceStub(channel)
        self._lease = lease
        self._call = stub.KeepAlive()
        self._call.add_done_callback(lambda _: wake.set())

    async def give(self, state: WorkerState, now_s: float, answer_timeout_s: float) -> None:
        """One sign and its answer. It says the state only when the registry has not heard it yet.

        Raises:
            TandemError: the lease is over, the stream ended, or no answer came.
        """
        lease, request = self._lease, pb.KeepAliveRequest(lease_id=self._lease.lease_id)
        if state is not lease.told_state:
            request.state = STATES[state]
        try:
            async with asyncio.timeout(answer_timeout_s):
                # A stream that has ended refuses the write; the read then raises what it ended with.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await self._call.write(request)
                answer = await self._call.read()
        except TimeoutError:
            raise ServiceError("no answer to a sign of life") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        if not isinstance(answer, pb.KeepAliveResponse):
            raise ServiceError("the registry ended the stream")
        lease.ttl_s = _seconds(answer.time_to_live)
        # From the asking: while the answer came, the registry's own clock ran.
        lease.end_s, lease.told_state = now_s + lease.ttl_s, state

    def close(self) -> None:
        """End the stream; the lease lives on for its time."""
        self._call.cancel()


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
