"""The same steady load over HTTP, at an edge: typed events as a browser's code would read them.

Owns what a failure is there: a status, an event that says so, or a body that was cut off. Record and judgement are the
other loads'.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from google.protobuf.json_format import MessageToDict, ParseDict

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import ServiceError
from tests.faults.support.steady_load import SteadyLoad

PREFIX = "data: "


class HttpLoad(SteadyLoad):
    """Asks edges at host:port."""

    def open_door(self, address: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://{address}", timeout=self.shape.deadline_s)

    async def close_door(self, door: Any) -> None:
        await door.aclose()

    async def events(self, door: Any, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        body = MessageToDict(request, preserving_proto_field_name=True)
        try:
            async with door.stream("POST", "/v1/generate", json=body) as response:
                if response.status_code != 200:
                    raise ServiceError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    if line:
                        yield _event(line)
        except httpx.HTTPError as problem:
            raise ServiceError(f"{type(problem).__name__}: {problem}") from None


def _event(line: str) -> pb.GenerateResponse:
    said = json.loads(line.removeprefix(PREFIX))
    if "error" in said:
        raise ServiceError(str(said["error"]))
    return ParseDict(said, pb.GenerateResponse())
