"""Server-sent events with names, as Responses and Messages stream them: the name is the `type` of the event's object.

Nothing marks the end of such a stream but its last event, so a failure is an event of its own and none follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem_frontend.call_context import Caller
from tandem_frontend.openai import response
from tandem_frontend.openai.blocks import BlockChoice
from tandem_frontend.openai.chat import PreparedChat
from tandem_frontend.openai.event_response import EventResponse
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.merge import EntrySink
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.response.writers import Call


class TypedEvents(EventResponse):
    """Sends each entry as an event with its type as the name."""

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """See `EntrySink`."""
        if choices:
            self._send(
                b"".join(b"event: " + entry["type"].encode() + b"\n" + response.event(entry) for entry in choices)
            )


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
        with events.kept_alive(handler.comment_s):
            await handler.generate(chat.requests, result, caller, events)
    except Exception as problem:
        # Nothing was sent yet, so the error can still be an HTTP status.
        if not events.has_begun:
            raise
        events.add(choice.failed(problem))
