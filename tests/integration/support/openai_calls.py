"""Calls of the OpenAI door over gRPC, as the edge makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc
from google.api import httpbody_pb2

from tandem.api.frontend.v1.openai_service_pb2_grpc import OpenAiServiceStub
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error

MODEL = "tandem-demo"


@dataclass
class Answer:
    """What came back, bodies put together."""

    content_type: str
    data: bytes

    @property
    def json(self) -> Any:
        assert self.content_type == "application/json"
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """The events of a stream that ended whole."""
        *events, done = self.raw_events
        assert done == "[DONE]"
        return [json.loads(event) for event in events]

    @property
    def raw_events(self) -> list[str]:
        assert self.content_type == "text/event-stream; charset=utf-8"
        *events, rest = self.data.decode().split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]


async def ask(address: str, call: str, body: Any) -> Answer:
    """Call ChatCompletions or Completions.

    Raises:
        TandemError: the call failed.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    bodies = []
    async with open_channel(address) as channel:
        stub: Any = OpenAiServiceStub(channel)
        try:
            async for answer in getattr(stub, call)(httpbody_pb2.HttpBody(data=data), timeout=30):
                bodies.append(answer)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
    return Answer(bodies[0].content_type, b"".join(answer.data for answer in bodies))


def chat(content: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """A greedy chat request of 12 tokens."""
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, **fields}


def completion(prompt: Any = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """A greedy completion request of 12 tokens."""
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
