"""RegistryService on the wire: protobuf to domain and back, nothing else.

The rules are in `validation` and `leases`, waiting is in the backend; tandem.rpc.handler_guard maps errors to statuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from tandem.errors import Draining, InvalidRequest
from tandem_registry.adapter_changes import AdapterChanges
from tandem_registry.backends.port import Backend
from tandem_registry.backends.subscriptions import Known
from tandem_registry.role_changes import RoleChanges
from tandem_registry.validation import (
    checked_adapters,
    checked_epoch,
    checked_frontend,
    checked_lease_id,
    checked_state,
    checked_worker,
    checked_worker_id,
)
from tandem_registry.view import View
from tandem_registry.view_messages import FrontendList, Snapshots, delta, duration, is_of_workers, listing

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RegistryService"].full_name


class RegistryServicer(pb_grpc.RegistryServiceServicer):
    """The methods of registry_service.proto."""

    def __init__(self, backend: Backend, role_changes: RoleChanges, adapter_changes: AdapterChanges) -> None:
        self._backend = backend
        self._adapter_changes = adapter_changes
        self._role_changes = role_changes
        self._ending = asyncio.Event()
        self._snapshots = Snapshots()

    def end_keep_alives(self) -> None:
        """Close the keep-alive streams with Draining: their clients never close them."""
        self._ending.set()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:  # noqa: N802
        """Register a worker and grant it a lease."""
        if not request.HasField("worker"):
            raise InvalidRequest("worker", "must be given")
        grant = await self._backend.register(checked_worker(request.worker))
        return pb.RegisterResponse(
            lease_id=grant.lease_id, time_to_live=duration(self._backend.ttl_s), revision=grant.revision
        )

    async def RegisterFrontend(  # noqa: N802
        self, request: pb.RegisterFrontendRequest, context: Any
    ) -> pb.RegisterFrontendResponse:
        """Register a frontend and grant it a lease."""
        if not request.HasField("frontend"):
            raise InvalidRequest("frontend", "must be given")
        grant = await self._backend.register(checked_frontend(request.frontend))
        return pb.RegisterFrontendResponse(lease_id=grant.lease_id, time_to_live=duration(self._backend.ttl_s))

    async def KeepAlive(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Any
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        """Renew the lease at each request. When the stream ends, the lease stays until it expires."""
        async for request in self._until_draining(request_iterator):
            adapters = checked_adapters("adapters", request.adapters) if request.HasField("adapters") else None
            state = checked_state(request.state)
            await self._backend.keep_alive(checked_lease_id(request.lease_id), state, adapters)
            yield pb.KeepAliveResponse(time_to_live=duration(self._backend.ttl_s), knows_adapters=True)

    async def _until_draining(self, requests: AsyncIterator[pb.KeepAliveRequest]) -> AsyncIterator[pb.KeepAliveRequest]:
        """Requests as they arrive.

        Raises:
            Draining: the registry is shutting down.
        """
        ending = asyncio.ensure_future(self._ending.wait())
        received: asyncio.Future[pb.KeepAliveRequest | None] = asyncio.ensure_future(anext(requests, None))
        try:
            while True:
                waits: set[asyncio.Future[Any]] = {received, ending}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not received.done():
                    raise Draining("the registry is shutting down")
                request = received.result()
                if request is None:
                    return
                yield request
                received = asyncio.ensure_future(anext(requests, None))
        finally:
            ending.cancel()
            received.cancel()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        """Send a snapshot, then each change, until the watcher disconnects or falls behind."""
        model = request.model if request.HasField("model") else None
        subscription = await self._backend.subscribe(_known(request))
        try:
            view = subscription.snapshot
            registry_id, revision = view.registry_id, view.revision
            yield self._snapshots.message(view, model)
            async for step in subscription.steps():
                if isinstance(step, View):
                    registry_id = step.registry_id
                    yield self._snapshots.message(step, model)
                elif is_of_workers(step):
                    yield delta(registry_id, revision, step, model)
                else:
                    continue
                revision = step.revision
        finally:
            subscription.close()

    async def WatchFrontends(  # noqa: N802
        self, request: pb.WatchFrontendsRequest, context: Any
    ) -> AsyncIterator[pb.WatchFrontendsResponse]:
        """Send all frontends, now and after each change of them."""
        subscription = await self._backend.subscribe()
        try:
            frontends = FrontendList(subscription.snapshot, request.model if request.HasField("model") else None)
            yield frontends.message()
            async for step in subscription.steps():
                if frontends.apply(step):
                    yield frontends.message()
        finally:
            subscription.close()

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        """The current view."""
        model = request.model if request.HasField("model") else None
        view = await self._backend.view()
        return listing(self._backend.replica_id, self._backend.origin, view, model)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:  # noqa: N802
        """Mark a worker as draining."""
        worker_id = checked_worker_id("worker_id", request.worker_id)
        revision = await self._backend.drain(worker_id, checked_epoch("epoch", request.epoch))
        return pb.DrainResponse(revision=revision)

    async def ChangeRole(  # noqa: N802
        self, request: pb.ChangeRoleRequest, context: Any
    ) -> AsyncIterator[pb.ChangeRoleResponse]:
        """Have a worker change its role, and pass on its progress."""
        async with aclosing(self._role_changes.change(request)) as steps:
            async for step in steps:
                yield pb.ChangeRoleResponse(change=step)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:  # noqa: N802
        """Load an adapter on all workers of a model, or on none."""
        return await self._adapter_changes.load(request)

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Any
    ) -> pb.UnloadAdapterResponse:
        """Unload an adapter on all workers that have it."""
        return await self._adapter_changes.unload(request)

    async def Campaign(self, request: pb.CampaignRequest, context: Any) -> pb.CampaignResponse:  # noqa: N802
        """Let a candidate lead, or report who does."""
        election = checked_worker_id("election", request.election)
        candidate_id = checked_worker_id("candidate_id", request.candidate_id)
        leadership, ttl_s = await self._backend.campaign(election, candidate_id, resign=request.resign)
        return pb.CampaignResponse(leader_id=leadership.leader_id, term=leadership.term, time_to_live=duration(ttl_s))

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:  # noqa: N802
        """Remove a worker or a frontend."""
        return pb.DeregisterResponse(revision=await self._backend.deregister(checked_lease_id(request.lease_id)))


def _known(request: pb.WatchRequest) -> Known | None:
    """Registry id and revision of the view that the watcher already has."""
    if request.HasField("known_registry_id") and request.HasField("known_revision"):
        return request.known_registry_id, request.known_revision
    return None
