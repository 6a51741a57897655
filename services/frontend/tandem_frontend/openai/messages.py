"""Chat messages: OpenAI's schemas, and their conversion to what a chat template reads.

Text only. Control tokens are removed from everything a client sent, so that no message can end its turn early.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import Many, MustBeNull, Schema


class TextPart(Schema):
    """A text part, the only kind that the models here support."""

    type: Literal["text"]
    text: str


Content = str | Annotated[Many[TextPart], Field(min_length=1)]


class SystemMessage(Schema):
    """Instructions for the model. `developer` is OpenAI's newer name of the role."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Schema):
    """A message of the end user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Schema):
    """A function the model called."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A tool call the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Schema):
    """An earlier message of the model."""

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
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def for_template(
    messages: Sequence[SystemMessage | UserMessage | AssistantMessage | ToolMessage], clean: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The messages as dicts, as chat templates expect them.

    Args:
        messages: as the client sent them.
        clean: removes control tokens from a text.

    Raises:
        InvalidRequest: names the message at fault.
    """
    return [_one(message, f"messages[{number}]", clean) for number, message in enumerate(messages)]


def _one(message: Any, path: str, clean: Callable[[str], str]) -> dict[str, Any]:
    # Most chat templates are older than the role "developer" and reject it.
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": clean(_text(message.content))}
    if message.name is not None:
        rendered["name"] = clean(message.name)
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = clean(message.tool_call_id)
    if isinstance(message, AssistantMessage):
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(f"{path}.content", "must be given unless there are tool_calls")
        if message.reasoning_content is not None:
            rendered["reasoning_content"] = clean(message.reasoning_content)
        if message.tool_calls:
            rendered["tool_calls"] = [
                _call(call, f"{path}.tool_calls[{number}]", clean) for number, call in enumerate(message.tool_calls)
            ]
    return rendered


def without_control(value: Any, clean: Callable[[str], str]) -> Any:
    """A JSON value without control tokens in any of its strings and keys."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [without_control(item, clean) for item in value]
    if isinstance(value, dict):
        return {clean(name): without_control(item, clean) for name, item in value.items()}
    return value


def _call(call: ToolCall, path: str, clean: Callable[[str], str]) -> dict[str, Any]:
    """A tool call. Its arguments are JSON text: parsed before cleaning, because escapes can hide a control token."""
    field = f"{path}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
        # JSON can contain half of a surrogate pair, which cannot be encoded as UTF-8.
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
