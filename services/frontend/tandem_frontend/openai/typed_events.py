"""Server-sent events with names, as Responses and Messages stream them: the name is the `type` of the event's object.

Nothing marks the end of such a stream but its last event, so a failure is an event of its own and none follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from tandem_frontend.call_context import Caller
from tandem_frontend.openai import response
from tandem_frontend.openai.blocks import BlockChoice
from tandem_frontend.openai.chat import PreparedChat
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.merge import EntrySink
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.response.writers import Call


class TypedEvents(EntrySink):
    """Sends each entry as an event."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.has_begun = False

    @property
    def is_writable(self) -> bool:
        """See `EntrySink`."""
        return self._call.writable

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `EntrySink`. A response here is one generation, so there is one callback."""
        self._call.on_writable(callback)

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """Send events. The first of them sets the content type of the whole response."""
        if not choices:
            return
        data = b"".join(b"event: " + entry["type"].encode() + b"\n" + response.event(entry) for entry in choices)
        self._call.send(HttpBody(data=data) if self.has_begun else HttpBody(content_type=response.EVENTS, data=data))
        self.has_begun = True


async def respond(
    handler: EndpointHandler, chat: PreparedChat, choice: BlockChoice, caller: Caller, call: Call, *, stream: bool
) -> None:
    """Generate, and send the response: one JSON body, or events where `stream` is set.

    Raises:
        TandemError: the generation failed before the first event; its `field` is a field of the contract.
    """
    result = ApiResponse({}, [choice], UsageSum(1), has_tool_grammar=chat.has_tool_grammar)
    if not stream:
        await handler.generate(chat.requests, result, caller, EntrySink())
        call.send(response.whole(choice.as_json()))
        return
    events = TypedEvents(call)
    try:
        await handler.generate(chat.requests, result, caller, events)
    except Exception as problem:
        # Nothing was sent yet, so the error can still be an HTTP status.
        if not events.has_begun:
            raise
        events.add(choice.failed(problem))
