"""The forms of Generate's responses: a stream of messages, server-sent events, or one message.

Each is a `pipeline.Answer` that a generation pushes into. Nothing waits for a chunk to be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem_frontend.response.sse import CONTENT_TYPE, Event, event_json, framed

CHUNK_TAG = bytes([pb.GenerateResponse.DESCRIPTOR.fields_by_name["chunk"].number << 3 | 2])


class Call(Protocol):
    """The part of a client's call that writers need (see `tandem.rpc.http2`)."""

    @property
    def writable(self) -> bool:
        """False while the client does not read."""
        ...

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Set the function that is called each time the call becomes writable again."""
        ...

    def send(self, message: Any) -> None:
        """Send a message of the method's type, in order; never blocks."""
        ...


class ClientCall(Call, Protocol):
    """A call whose headers are not sent yet."""

    def set_initial_metadata(self, head: Callable[[], Sequence[tuple[str, str]]]) -> None:
        """Set what the response's headers hold, asked for when they are sent."""
        ...


class CallWriter:
    """Base of the writers that send chunks as they arrive."""

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
        """See `pipeline.Answer`."""
        self._call.send(pb.GenerateResponse(accepted=accepted))

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        # As GenerateResponse(chunk=chunk) would be encoded, at half the cost: the constructor copies the chunk.
        data = chunk.SerializeToString()
        self._call.send(CHUNK_TAG + _varint(len(data)) + data)

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `pipeline.Answer`."""
        self._call.send(pb.GenerateResponse(finish=finish))


class SseWriter(CallWriter):
    """GenerateEvents: each event is a server-sent event; the first one sets the content type of the whole response."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.has_begun = False

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `pipeline.Answer`."""
        self._send(accepted)

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        self._send(chunk)

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `pipeline.Answer`."""
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
        """See `relay.Outlet`. Never called, because it is always writable."""

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `pipeline.Answer`."""
        self.response.request_id, self.response.model = accepted.request_id, accepted.model

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        self._texts.append(chunk.text)
        self.response.token_ids.extend(chunk.token_ids)
        self.response.logprobs.extend(chunk.logprobs)

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `pipeline.Answer`."""
        self.response.text = "".join(self._texts)
        self.response.finish.CopyFrom(finish)


def _varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
