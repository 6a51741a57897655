"""A registry that publishes the lists of frontends a test puts into it, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from tandem.api.types.v1 import worker_pb2
from tandem.errors import Draining
from tandem.rpc.server import RpcServer

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RegistryService"].full_name


class PublishingRegistry(pb_grpc.RegistryServiceServicer):
    """Publishes the lists a test puts into it, to every watch."""

    def __init__(self, registry_id: str) -> None:
        self.registry_id = registry_id
        self.refuses = False
        self.watchers = 0
        self._changed = asyncio.Event()
        self._last = pb.WatchFrontendsResponse(registry_id=registry_id)

    def publish(self, *addresses: str, revision: int | None = None, draining: tuple[str, ...] = ()) -> None:
        """`addresses` are host:port, or host:port=model."""
        frontends = [
            worker_pb2.Frontend(
                frontend_id=address,
                epoch=1,
                address=address.partition("=")[0],
                model=address.partition("=")[2],
                state=worker_pb2.WORKER_STATE_DRAINING
                if address.partition("=")[0] in draining
                else worker_pb2.WORKER_STATE_SERVING,
            )
            for address in addresses
        ]
        number = self._last.revision + 1 if revision is None else revision
        self._last = pb.WatchFrontendsResponse(registry_id=self.registry_id, revision=number, frontends=frontends)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def WatchFrontends(self, request: Any, context: Any) -> AsyncIterator[pb.WatchFrontendsResponse]:  # noqa: N802
        if self.refuses:
            raise Draining("going away")
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                yield self._last
                await changed.wait()
        finally:
            self.watchers -= 1


@contextlib.asynccontextmanager
async def publishing(registry_id: str = "r1", port: int = 0) -> AsyncIterator[tuple[PublishingRegistry, str]]:
    registry = PublishingRegistry(registry_id)  # type: ignore[abstract] # it answers some calls only
    server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_RegistryServiceServicer_to_server, registry))])
    await server.start("127.0.0.1", port)
    try:
        yield registry, f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)
