"""An edge of its own before frontends of the test's own: real Envoy, real gRPC, answers that the test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from google.api.httpbody_pb2 import HttpBody
from tandem_edge.envoy_admin import Admin
from tandem_edge.transcoding import HEALTH_SERVICE_NAME

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.local_cluster.child_process import ClusterProcess
from tandem.rpc.server import RpcServer
from tandem.service import run_directory

JSON = {"content-type": "application/json"}


class StubFrontend(pb_grpc.InferenceServiceServicer):
    """Answers what the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.text = "text"
        self.delay_s = 0.0
        self.headers_first = False
        """Whether the answer's headers are on their way before it is known how the call ends."""
        self.stream: Callable[[], AsyncIterator[HttpBody]] | None = None
        self.seen: list[dict[str, Any]] = []

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        self.seen.append(dict(context.invocation_metadata()))
        if self.headers_first:
            await context.send_initial_metadata(())
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        return pb.DetokenizeResponse(text=self.text)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(model=pb.Model(name=request.model))

    async def GenerateEvents(self, request: pb.GenerateEventsRequest, context: Any) -> AsyncIterator[HttpBody]:  # noqa: N802
        assert self.stream is not None
        async with contextlib.aclosing(self.stream()) as bodies:  # type: ignore[type-var]
            async for body in bodies:
                yield body


@asynccontextmanager
async def stub_frontend(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[tuple[StubFrontend, str]]:
    """A frontend that is healthy, and its address; its text is its address until the test says otherwise."""
    stub = StubFrontend()  # type: ignore[abstract] # it answers some calls only
    server = RpcServer([(HEALTH_SERVICE_NAME, partial(pb_grpc.add_InferenceServiceServicer_to_server, stub))])
    await server.start(host, port)
    await server.set_serving(True)
    stub.text = address = f"{host}:{server.port}"
    try:
        yield stub, address
    finally:
        await server.stop(0)


@asynccontextmanager
async def edge(logs: Path, frontends: str | None = None, **flags: Any) -> AsyncIterator[ClusterProcess]:
    """tandem-edge as a process of its own, ready. Without `frontends`, `flags` say where it learns of them."""
    given = {"port": "0", "threads": "1", "drain-settle-s": "0", "drain-timeout-s": "5"}
    given |= {} if frontends is None else {"frontends": frontends}
    given |= {key.replace("_", "-"): str(value) for key, value in flags.items()}
    process = ClusterProcess("edge", "edge", given, logs)
    # Not the test's own directory: the path of a socket is short.
    run = run_directory.make()
    try:
        await process.start(run)
        await process.wait_ready()
        yield process
    finally:
        await process.stop()
        # The last process in it has removed it, unless it was killed.
        shutil.rmtree(run, ignore_errors=True)


@asynccontextmanager
async def client_of(process: ClusterProcess, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{process.address}", timeout=10, **options) as client:
        yield client


def admin_of(process: ClusterProcess) -> tuple[Admin, Path]:
    """The admin interface of an edge's Envoy, and the directory of its files."""
    (envoy,) = psutil.Process(process.pid).children()
    command = envoy.cmdline()
    directory = Path(command[command.index("--config-path") + 1]).parent
    return Admin(directory / "admin.sock"), directory


async def detokenize(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    """The smallest call there is."""
    return await client.post("/v1/detokenize", json={"token_ids": [1]}, headers=headers)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of an answer; there is nothing beside it, and nothing is missing in it."""
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"]
    return error


async def exchange(address: str, sent: bytes, within_s: float = 5) -> tuple[int, dict[str, Any] | None]:
    """Send exact bytes; the status and the error that come back before the connection is closed or falls silent."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        async with asyncio.timeout(within_s):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(line.split(":")[1]) for line in head.lower().splitlines() if line.startswith("content-length")), 0
            )
            body = await reader.readexactly(length)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return int(head.split()[1]), json.loads(body)["error"] if body else None
