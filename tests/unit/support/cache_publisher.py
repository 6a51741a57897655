"""A gRPC server that publishes a prefix cache as a test scripts it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.rpc.server import RpcServer

Message = pb.WatchKvEventsResponse


class ScriptedWorker(pb_grpc.WorkerServiceServicer):
    """Sends on each call what `first` returns, then what the test puts into `later`; None ends the call."""

    def __init__(self, first: Callable[[], Iterator[Message]]) -> None:
        self.first = first
        self.requests: list[pb.WatchKvEventsRequest] = []
        self.later: asyncio.Queue[Message | None] = asyncio.Queue()

    async def WatchKvEvents(self, request: pb.WatchKvEventsRequest, context: Any) -> AsyncIterator[Message]:  # noqa: N802
        self.requests.append(request)
        for message in self.first():
            yield message
        while (more := await self.later.get()) is not None:
            yield more


@contextlib.asynccontextmanager
async def publishing(first: Callable[[], Iterator[Message]]) -> AsyncIterator[tuple[ScriptedWorker, str]]:
    """A served `ScriptedWorker` and its address."""
    servicer = ScriptedWorker(first)  # type: ignore[abstract]
    name = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
    server = RpcServer([(name, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    try:
        yield servicer, f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)
