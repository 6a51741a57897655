"""A client's calls, with everything a test may want to assert on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster


@dataclass
class Stream:
    """All events of one generation that ended with a finish."""

    events: list[pb.GenerateResponse] = field(default_factory=list)

    @property
    def accepted(self) -> pb.GenerateAccepted:
        assert self.events[0].HasField("accepted"), "the stream does not begin with accepted"
        return self.events[0].accepted

    @property
    def chunks(self) -> list[pb.GenerateChunk]:
        return [event.chunk for event in self.events if event.HasField("chunk")]

    @property
    def finish(self) -> pb.GenerateFinish:
        assert self.events[-1].HasField("finish"), "the stream does not end with a finish"
        assert sum(event.HasField("finish") for event in self.events) == 1
        return self.events[-1].finish

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]


def request_of(
    prompt: str | None = None, *, token_ids: list[int] | None = None, chat: str | None = None, **stopping: Any
) -> pb.GenerateRequest:
    """A greedy request."""
    request = pb.GenerateRequest(sampling={"temperature": 0.0}, stopping={"max_tokens": 16, **stopping})  # type: ignore[arg-type]
    if prompt is not None:
        request.prompt = prompt
    if token_ids is not None:
        request.token_ids.ids.extend(token_ids)
    if chat is not None:
        request.chat.messages.add(role="user", content=chat)
    return request


async def generate(cluster: LocalCluster, request: pb.GenerateRequest, frontend: int = 0) -> Stream:
    """Run a generation at one of the frontends to its end; chunk indices must be contiguous."""
    stream = Stream()
    async with contextlib.aclosing(calls.generate(cluster.frontends[frontend].address, request, 60)) as events:
        async for event in events:
            stream.events.append(event)
    assert [chunk.index for chunk in stream.chunks] == list(range(len(stream.chunks)))
    assert stream.accepted.request_id
    assert stream.finish.usage.completion_tokens == len(stream.token_ids)
    return stream


async def refusal(cluster: LocalCluster, request: pb.GenerateRequest) -> TandemError:
    """The error a generation ends with; it must not have begun."""
    try:
        stream = await generate(cluster, request)
    except TandemError as problem:
        return problem
    raise AssertionError(f"the request was answered: {stream.text!r}")
