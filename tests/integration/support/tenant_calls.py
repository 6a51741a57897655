"""Calls in the name of a tenant, straight to a frontend: with the header that the edge sets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error

HEADER = "x-client-id"


async def generate_as(
    client: str, address: str, request: pb.GenerateRequest
) -> tuple[pb.GenerateUnaryResponse, dict[str, str]]:
    """A generation in one message, and the headers of the response.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.GenerateUnary(pb.GenerateUnaryRequest(generate=request), timeout=30, metadata=((HEADER, client),))
        try:
            response = await call
            return response, dict(await call.initial_metadata())
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


@asynccontextmanager
async def open_streams_as(
    client: str, addresses: list[str], request: pb.GenerateRequest
) -> AsyncIterator[list[dict[str, str]]]:
    """A stream at each of the addresses that has begun, and its headers; the client leaves at the end of the block."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(open_channel(address)) for address in addresses]
        stubs: list[Any] = [InferenceServiceStub(channel) for channel in channels]
        calls = [stub.Generate(request, timeout=60, metadata=((HEADER, client),)) for stub in stubs]
        for call in calls:
            stack.callback(call.cancel)
        try:
            await asyncio.gather(*(call.read() for call in calls))
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        yield [dict(await call.initial_metadata()) for call in calls]


def usage_lines(text: str) -> list[dict[str, Any]]:
    """The whole lines of a usage log."""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
