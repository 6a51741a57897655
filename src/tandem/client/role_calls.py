"""Client calls that change a worker's role: at a registry, and from there at the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import role_change_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client.call_errors import call_error
from tandem.domain.worker import WorkerRole
from tandem.errors import InvalidRequest
from tandem.rpc.channels import Channels, open_channel
from tandem.rpc.convert import ROLE_BY_NUMBER, ROLES
from tandem.rpc.status import from_rpc_error
from tandem.tls.paths import Tls

DRAIN_TIMEOUT_MAX_S = 86_400
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """An election that the caller leads."""

    election: str
    term: int


async def campaign(
    registry: str, election: str, candidate_id: str, *, resign: bool = False, tls: Tls | None = None
) -> registry_pb.CampaignResponse:
    """Ask a registry to lead an election, or give it up.

    Raises:
        TandemError: the call failed.
    """
    request = registry_pb.CampaignRequest(election=election, candidate_id=candidate_id, resign=resign)
    async with open_channel(registry, tls) as channel:
        stub: Any = RegistryServiceStub(channel)
        try:
            response: registry_pb.CampaignResponse = await stub.Campaign(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, registry, tls) from None
        return response


async def roles_of(channels: Channels, address: str) -> frozenset[WorkerRole]:
    """Roles that the worker at an address may take, the present one included.

    Raises:
        TandemError: the call failed.
    """
    stub: Any = WorkerServiceStub(channels.get(address))
    try:
        response = await stub.GetCapabilities(worker_pb.GetCapabilitiesRequest(), timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    return frozenset(ROLE_BY_NUMBER[number] for number in response.roles if number in ROLE_BY_NUMBER)


async def change_role(
    registry: str,
    worker_id: str,
    role: WorkerRole,
    *,
    epoch: int | None = None,
    force: bool = False,
    drain_timeout_s: float | None = None,
    leading: Leading | None = None,
    tls: Tls | None = None,
) -> AsyncGenerator[role_change_pb2.RoleChange, None]:
    """Change a worker's role; yields the progress, to DONE. The change goes on when the iterator is closed.

    Raises:
        InvalidRequest: the drain's timeout is no number of seconds up to a day.
        RoleChangeRefused: nothing has changed.
        TandemError: the call failed, or the change did.
    """
    request = registry_pb.ChangeRoleRequest(worker_id=worker_id, epoch=epoch, role=ROLES[role], force=force)
    if drain_timeout_s is not None and not 0 <= drain_timeout_s <= DRAIN_TIMEOUT_MAX_S:
        raise InvalidRequest("drain_timeout", f"must be 0 to {DRAIN_TIMEOUT_MAX_S} s, not {drain_timeout_s}")
    if leading is not None:
        request.election, request.leader_term = leading.election, leading.term
    if drain_timeout_s is not None:
        request.drain_timeout.CopyFrom(_duration(drain_timeout_s))
    async with open_channel(registry, tls) as channel:
        stub: Any = RegistryServiceStub(channel)
        call = stub.ChangeRole(request)
        has_responded = False
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                has_responded = True
                yield response.change
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, registry, tls, has_responded=has_responded) from None
        finally:
            call.cancel()


async def change_at_worker(
    channels: Channels, address: str, request: worker_pb.ChangeRoleRequest
) -> AsyncGenerator[role_change_pb2.RoleChange, None]:
    """Have a worker change its role; yields the progress, as `change_role`.

    Raises:
        TandemError: the worker refused, or cannot be reached, or the change failed.
    """
    stub: Any = WorkerServiceStub(channels.get(address))
    call = stub.ChangeRole(request)
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            yield response.change
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    finally:
        call.cancel()


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
