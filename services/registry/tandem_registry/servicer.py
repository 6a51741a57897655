"""RegistryService on the wire: protobuf to domain and back, nothing else.

Rules are in `validation` and `membership`, waiting in the backend; errors become statuses in tandem.rpc.interceptors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from tandem.errors import Draining, InvalidRequest
from tandem.model.worker import Worker
from tandem.rpc.messages import worker_to_proto
from tandem_registry.backends.port import Backend
from tandem_registry.membership import Change, RemovalReason
from tandem_registry.validation import (
    checked_epoch,
    checked_lease_id,
    checked_state,
    checked_worker,
    checked_worker_id,
)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RegistryService"].full_name

REMOVAL_REASONS = {
    RemovalReason.DEREGISTERED: pb.REMOVAL_REASON_DEREGISTERED,
    RemovalReason.LEASE_EXPIRED: pb.REMOVAL_REASON_LEASE_EXPIRED,
    RemovalReason.REPLACED: pb.REMOVAL_REASON_REPLACED,
}


class RegistryServicer(pb_grpc.RegistryServiceServicer):
    """Each method is one contract of registry_service.proto."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ending = asyncio.Event()

    def end_signs_of_life(self) -> None:
        """End the streams of signs of life, which never end by themselves, with Draining."""
        self._ending.set()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:  # noqa: N802
        """Enter a worker and grant it a lease."""
        if not request.HasField("worker"):
            raise InvalidRequest("worker", "must be given")
        grant = await self._backend.register(checked_worker(request.worker))
        return pb.RegisterResponse(
            lease_id=grant.lease_id, time_to_live=_duration(self._backend.ttl_s), revision=grant.revision
        )

    async def KeepAlive(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Any
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        """Answer each sign of life. The end of the stream leaves the lease to its time."""
        async for request in self._until_the_end(request_iterator):
            await self._backend.keep_alive(checked_lease_id(request.lease_id), checked_state(request.state))
            yield pb.KeepAliveResponse(time_to_live=_duration(self._backend.ttl_s))

    async def _until_the_end(self, requests: AsyncIterator[pb.KeepAliveRequest]) -> AsyncIterator[pb.KeepAliveRequest]:
        """Requests as they come.

        Raises:
            Draining: the registry is going away.
        """
        ending = asyncio.ensure_future(self._ending.wait())
        coming: asyncio.Future[pb.KeepAliveRequest | None] = asyncio.ensure_future(anext(requests, None))
        try:
            while True:
                waits: set[asyncio.Future[Any]] = {coming, ending}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise Draining("the registry is going away")
                request = coming.result()
                if request is None:
                    return
                yield request
                coming = asyncio.ensure_future(anext(requests, None))
        finally:
            ending.cancel()
            coming.cancel()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        """Send the view, then its changes, until the watcher leaves or falls behind."""
        model = request.model if request.HasField("model") else None
        registry_id = self._backend.registry_id
        subscription = await self._backend.subscribe()
        try:
            view = subscription.snapshot
            workers = [worker_to_proto(entry.worker) for entry in view.entries if _serves(entry.worker, model)]
            snapshot = pb.ViewSnapshot(workers=workers)
            yield pb.WatchResponse(registry_id=registry_id, revision=view.revision, snapshot=snapshot)
            async for change in subscription.changes():
                # A change of other models' workers is an empty delta: revisions stay contiguous for every watcher.
                delta = _delta(change, model)
                yield pb.WatchResponse(registry_id=registry_id, revision=change.revision, delta=delta)
        finally:
            subscription.close()

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        """The view at this moment."""
        model = request.model if request.HasField("model") else None
        view = await self._backend.view()
        workers = [
            pb.ListedWorker(worker=worker_to_proto(entry.worker), lease_age=_duration(entry.lease_age_s))
            for entry in view.entries
            if _serves(entry.worker, model)
        ]
        return pb.ListResponse(registry_id=self._backend.registry_id, revision=view.revision, workers=workers)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:  # noqa: N802
        """Mark a worker as draining."""
        worker_id = checked_worker_id("worker_id", request.worker_id)
        revision = await self._backend.drain(worker_id, checked_epoch("epoch", request.epoch))
        return pb.DrainResponse(revision=revision)

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:  # noqa: N802
        """Take a worker out."""
        return pb.DeregisterResponse(revision=await self._backend.deregister(checked_lease_id(request.lease_id)))


def _serves(worker: Worker, model: str | None) -> bool:
    return model is None or worker.capabilities.model == model


def _delta(change: Change, model: str | None) -> pb.ViewDelta:
    return pb.ViewDelta(
        upserted=[worker_to_proto(worker) for worker in change.upserted if _serves(worker, model)],
        removed=[
            pb.RemovedWorker(
                worker_id=removed.worker.worker_id,
                epoch=removed.worker.epoch,
                reason=REMOVAL_REASONS[removed.reason],
            )
            for removed in change.removed
            if _serves(removed.worker, model)
        ],
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
