"""A client as a process of its own: python -m tests.faults.support.streaming_client KIND HOST:PORT REQUEST

KIND is grpc, http1 or http2; REQUEST is a GenerateRequest as JSON. Prints a line when the call is on its way, and
another for each event.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import httpx
from google.protobuf import json_format

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls


async def http_lines(address: str, request: str, *, is_http2: bool) -> AsyncIterator[object]:
    async with (
        httpx.AsyncClient(http2=is_http2, http1=not is_http2, timeout=None) as client,
        client.stream(
            "POST", f"http://{address}/v1/generate", content=request, headers={"content-type": "application/json"}
        ) as response,
    ):
        assert response.http_version == ("HTTP/2" if is_http2 else "HTTP/1.1")
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            yield line


async def main(kind: str, address: str, request: str) -> None:
    print("begun", flush=True)
    events: AsyncIterator[object] = (
        calls.generate(address, json_format.Parse(request, pb.GenerateRequest()))
        if kind == "grpc"
        else http_lines(address, request, is_http2=kind == "http2")
    )
    async for _ in events:
        print("event", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
