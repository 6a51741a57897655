"""A registry that responds as a test sets it, over a real socket, and records what it was asked and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from tandem.domain.frontend import Frontend
from tandem.domain.worker import Worker
from tandem.errors import TandemError, WorkerNotFound
from tandem.rpc.convert import frontend_to_proto, worker_to_proto
from tandem.rpc.server import RpcServer
from tandem.tls.paths import Tls

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RegistryService"].full_name


class ScriptedRegistry(pb_grpc.RegistryServiceServicer):
    """Grants every lease; what it says to a watch and to signs of life can be set."""

    # What no client of these tests calls answers UNIMPLEMENTED.
    Drain: Any = pb_grpc.RegistryServiceServicer.Drain
    ChangeRole: Any = pb_grpc.RegistryServiceServicer.ChangeRole
    LoadAdapter: Any = pb_grpc.RegistryServiceServicer.LoadAdapter
    UnloadAdapter: Any = pb_grpc.RegistryServiceServicer.UnloadAdapter
    Campaign: Any = pb_grpc.RegistryServiceServicer.Campaign
    List: Any = pb_grpc.RegistryServiceServicer.List

    def __init__(self, registry_id: str = "scripted", ttl_s: float = 5.0) -> None:
        self.registry_id = registry_id
        self.ttl_s = ttl_s
        self.address = ""
        self.revision = 0
        self.workers: tuple[Worker, ...] = ()
        self.frontends: tuple[Frontend, ...] = ()
        self.frontends_changed = asyncio.Event()
        """Set to send `frontends` once more to every watch."""
        self.steps: asyncio.Queue[pb.WatchResponse] = asyncio.Queue()
        self.watch_error: Callable[[pb.WatchRequest], TandemError | None] = lambda request: None
        self.watched: list[pb.WatchRequest] = []
        self.registered: list[tuple[float, str, int]] = []
        """Time of arrival, id and epoch."""
        self.leases: set[str] = set()
        self.knows_adapters = True
        """False: it is of a release before adapters."""
        self.adapters: list[list[str]] = []
        """Names in each keep-alive that had any."""
        self.stop: Callable[[], Awaitable[None]]
        """Goes away, while `play_registry` serves it."""
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        """Whether Register is answered at once; else when this is set."""
        self.register_error: Callable[[str, int], TandemError | None] = lambda member_id, epoch: None

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:  # noqa: N802
        lease_id = self._grant(request.worker.worker_id, request.worker.epoch)
        await self.may_answer.wait()
        return pb.RegisterResponse(lease_id=lease_id, time_to_live=_duration(self.ttl_s), revision=1)

    async def RegisterFrontend(  # noqa: N802
        self, request: pb.RegisterFrontendRequest, context: Any
    ) -> pb.RegisterFrontendResponse:
        lease_id = self._grant(request.frontend.frontend_id, request.frontend.epoch)
        return pb.RegisterFrontendResponse(lease_id=lease_id, time_to_live=_duration(self.ttl_s))

    def _grant(self, member_id: str, epoch: int) -> str:
        self.registered.append((time.monotonic(), member_id, epoch))
        error = self.register_error(member_id, epoch)
        if error is not None:
            raise error
        lease_id = f"{member_id}.{epoch}.{len(self.registered)}"
        self.leases.add(lease_id)
        return lease_id

    async def KeepAlive(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Any
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        async for request in request_iterator:
            if request.lease_id not in self.leases:
                raise WorkerNotFound("no such lease")
            if request.HasField("adapters"):
                self.adapters.append([adapter.name for adapter in request.adapters.adapters])
            yield pb.KeepAliveResponse(time_to_live=_duration(self.ttl_s), knows_adapters=self.knows_adapters)

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:  # noqa: N802
        self.leases.discard(request.lease_id)
        return pb.DeregisterResponse(revision=1)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        self.watched.append(request)
        error = self.watch_error(request)
        if error is not None:
            raise error
        snapshot = pb.ViewSnapshot(workers=map(worker_to_proto, self.workers))
        yield pb.WatchResponse(registry_id=self.registry_id, revision=self.revision, snapshot=snapshot)
        while True:
            yield await self.steps.get()

    async def WatchFrontends(  # noqa: N802
        self, request: pb.WatchFrontendsRequest, context: Any
    ) -> AsyncIterator[pb.WatchFrontendsResponse]:
        revision = 0
        while True:
            revision += 1
            listed = map(frontend_to_proto, self.frontends)
            yield pb.WatchFrontendsResponse(registry_id=self.registry_id, revision=revision, frontends=listed)
            await self.frontends_changed.wait()
            self.frontends_changed.clear()

    def step(
        self, previous: int | None, revision: int, upserted: Iterable[Worker] = (), removed: Iterable[Worker] = ()
    ) -> None:
        """Send a delta to every watch."""
        gone = [pb.RemovedWorker(worker_id=worker.worker_id, epoch=worker.epoch) for worker in removed]
        delta = pb.ViewDelta(upserted=map(worker_to_proto, upserted), removed=gone)
        step = pb.WatchResponse(registry_id=self.registry_id, revision=revision, delta=delta)
        if previous is not None:
            step.previous_revision = previous
        self.steps.put_nowait(step)


@asynccontextmanager
async def play_registry(
    registry: ScriptedRegistry, port: int = 0, tls: Tls | None = None
) -> AsyncIterator[ScriptedRegistry]:
    services = [(SERVICE_NAME, partial(pb_grpc.add_RegistryServiceServicer_to_server, registry))]
    server = RpcServer(services, tls=tls)
    await server.start("127.0.0.1", port)
    registry.address = f"127.0.0.1:{server.port}"
    registry.stop = partial(server.stop, 0)
    try:
        yield registry
    finally:
        await server.stop(0)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
