"""Messages of a chat: OpenAI's shapes, and what a chat template is given of them.

Text only. Control tokens are taken out of everything a client wrote: its author must not be able to end a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import Many, MustBeNull, Schema


class TextPart(Schema):
    """A piece of text; the only kind of part that the models here read."""

    type: Literal["text"]
    text: str


Content = str | Annotated[Many[TextPart], Field(min_length=1)]


class SystemMessage(Schema):
    """What the model is to be and do. `developer` is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Schema):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Schema):
    """A function the model called."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A call the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Schema):
    """What the model said before."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: MustBeNull = None
    audio: MustBeNull = None
    function_call: MustBeNull = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Schema):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def for_template(
    messages: Sequence[SystemMessage | UserMessage | AssistantMessage | ToolMessage], clean: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The messages as chat templates read them.

    Args:
        messages: as the client sent them.
        clean: takes control tokens out of a text.

    Raises:
        InvalidRequest: names the message at fault.
    """
    return [_one(message, f"messages[{number}]", clean) for number, message in enumerate(messages)]


def _one(message: Any, place: str, clean: Callable[[str], str]) -> dict[str, Any]:
    # Templates were written before "developer" was; they know it as the system's voice.
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": clean(_text(message.content))}
    if message.name is not None:
        told["name"] = clean(message.name)
    if isinstance(message, ToolMessage):
        told["tool_call_id"] = clean(message.tool_call_id)
    if isinstance(message, AssistantMessage):
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(f"{place}.content", "must be given where there are no tool_calls")
        if message.reasoning_content is not None:
            told["reasoning_content"] = clean(message.reasoning_content)
        if message.tool_calls:
            told["tool_calls"] = [
                _call(call, f"{place}.tool_calls[{number}]", clean) for number, call in enumerate(message.tool_calls)
            ]
    return told


def without_control(value: Any, clean: Callable[[str], str]) -> Any:
    """A JSON value without control tokens in any of its texts."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [without_control(item, clean) for item in value]
    if isinstance(value, dict):
        return {clean(name): without_control(item, clean) for name, item in value.items()}
    return value


def _call(call: ToolCall, place: str, clean: Callable[[str], str]) -> dict[str, Any]:
    """Arguments are a text of JSON: what is escaped in it is read first, and cleaned then."""
    field = f"{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
        # JSON can spell half of a surrogate pair, which no text can hold.
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(field, "is not valid Unicode") from None
    except (ValueError, RecursionError):
        raise InvalidRequest(field, "is not JSON") from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(field, "must be a JSON object")
    function = {"name": clean(call.function.name), "arguments": without_control(arguments, clean)}
    return {"id": clean(call.id), "type": "function", "function": function}


def _text(content: str | list[TextPart] | None) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
