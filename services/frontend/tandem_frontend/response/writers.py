"""The forms in which Generate's answers leave: messages of a stream, server-sent events, or one message.

Each is an `Answer` that a generation pushes into. `CallWriter` writes to the client's call as chunks come; nothing
waits for a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem_frontend.response.sse import CONTENT_TYPE, Event, event_json, framed


class Call(Protocol):
    """A client's call, as far as answers need it (`tandem.rpc.http2`)."""

    @property
    def writable(self) -> bool:
        """False while the client does not read what was sent."""
        ...

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Called each time it becomes writable again."""
        ...

    def send(self, message: Any) -> None:
        """Send a message of the method's type, in order; never blocks."""
        ...


class CallWriter:
    """What answers that leave as they come have in common."""

    def __init__(self, call: Call) -> None:
        self._call = call

    @property
    def is_writable(self) -> bool:
        """See `relay.Outlet`."""
        return self._call.writable

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `relay.Outlet`."""
        self._call.on_writable(callback)


class ChunkWriter(CallWriter):
    """Generate: each event is a message."""

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `generation.Answer`."""
        self._call.send(pb.GenerateResponse(accepted=accepted))

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        self._call.send(pb.GenerateResponse(chunk=chunk))

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `generation.Answer`."""
        self._call.send(pb.GenerateResponse(finish=finish))


class SseWriter(CallWriter):
    """GenerateEvents: each event is a server-sent event; the first one sets the content type of the whole answer."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.has_begun = False

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `generation.Answer`."""
        self._send(accepted)

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        self._send(chunk)

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `generation.Answer`."""
        self._send(finish)

    def _send(self, event: Event) -> None:
        data = framed(event_json(event))
        self._call.send(HttpBody(data=data) if self.has_begun else HttpBody(content_type=CONTENT_TYPE, data=data))
        self.has_begun = True


class UnaryWriter:
    """GenerateUnary: everything in one message, `response`."""

    def __init__(self) -> None:
        self.response = pb.GenerateUnaryResponse()
        self._texts: list[str] = []

    @property
    def is_writable(self) -> bool:
        """See `relay.Outlet`."""
        return True

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `relay.Outlet`: it always is."""

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `generation.Answer`."""
        self.response.request_id, self.response.model = accepted.request_id, accepted.model

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        self._texts.append(chunk.text)
        self.response.token_ids.extend(chunk.token_ids)
        self.response.logprobs.extend(chunk.logprobs)

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `generation.Answer`."""
        self.response.text = "".join(self._texts)
        self.response.finish.CopyFrom(finish)
