"""The calls that register a member and renew its lease: converts protobuf messages, raises failures as TandemError.

Workers and frontends register by different calls; everything after that is the same for both. `registration` decides
when to call.
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
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import WorkerState
from tandem.errors import ServiceError
from tandem.rpc.convert import STATES, adapter_to_proto, frontend_to_proto, worker_to_proto
from tandem.rpc.status import from_rpc_error

REGISTER_TIMEOUT_S = 3.0
DEREGISTER_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class LeaseTime:
    """Time to live of leases, and the end of the current one unless renewed: never after its expiry at the registry."""

    ttl_s: float
    end_s: float


@dataclass(slots=True)
class Lease:
    """A lease as its member knows it."""

    lease_id: str
    ttl_s: float
    end_s: float
    reported_state: WorkerState
    """The member's state that the registry has confirmed."""
    reported_adapters: tuple[Adapter, ...] = ()
    """The same of a worker's adapters."""

    def has(self, member: Member) -> bool:
        """Whether the registry has confirmed the member's present state and adapters."""
        return self.reported_state is member.state and self.reported_adapters == adapters_of(member)


def adapters_of(member: Member) -> tuple[Adapter, ...]:
    """A worker's adapters; a frontend has none."""
    return () if isinstance(member, Frontend) else member.adapters


async def grant(channel: grpc.aio.Channel, member: Member, now_s: float) -> Lease:
    """Register a member.

    Raises:
        TandemError: the registry rejected it, or did not respond.
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
    return Lease(granted.lease_id, ttl_s, now_s + ttl_s, member.state, adapters_of(member))


async def give_up(channel: grpc.aio.Channel, lease: Lease) -> None:
    """Deregister the lease's member.

    Raises:
        TandemError: the registry was not reached.
    """
    stub: Any = RegistryServiceStub(channel)
    try:
        await stub.Deregister(pb.DeregisterRequest(lease_id=lease.lease_id), timeout=DEREGISTER_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None


class KeepAliveStream:
    """One keep-alive stream for one lease. The caller must close it."""

    def __init__(self, channel: grpc.aio.Channel, lease: Lease, wake: asyncio.Event) -> None:
        """`wake` is set when the stream ends, so that a lost registry is noticed before the next keep-alive."""
        stub: Any = RegistryServiceStub(channel)
        self._lease = lease
        self._call = stub.KeepAlive()
        self._call.add_done_callback(lambda _: wake.set())

    async def send(self, member: Member, now_s: float, response_timeout_s: float) -> None:
        """Send one keep-alive and wait for its response. It contains the state and the adapters of the member until
        the registry has confirmed them.

        Raises:
            TandemError: the lease has expired, the stream ended, or no response came in time.
        """
        lease, request = self._lease, pb.KeepAliveRequest(lease_id=self._lease.lease_id)
        state, adapters = member.state, adapters_of(member)
        if state is not lease.reported_state:
            request.state = STATES[state]
        if adapters != lease.reported_adapters:
            request.adapters.CopyFrom(pb.AdapterList(adapters=map(adapter_to_proto, adapters)))
        try:
            async with asyncio.timeout(response_timeout_s):
                # On an ended stream the write fails without a reason; the read then raises the stream's status.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await self._call.write(request)
                response = await self._call.read()
        except TimeoutError:
            raise ServiceError(f"no response to a keep-alive within {response_timeout_s:g} s") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        if not isinstance(response, pb.KeepAliveResponse):
            raise ServiceError("the registry closed the keep-alive stream")
        lease.ttl_s = _seconds(response.time_to_live)
        # Counted from the request: the registry renewed the lease before its response arrived here.
        lease.end_s, lease.reported_state = now_s + lease.ttl_s, state
        if response.knows_adapters:
            lease.reported_adapters = adapters

    def close(self) -> None:
        """Close the stream; the lease stays until it expires."""
        self._call.cancel()


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
