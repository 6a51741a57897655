"""Chat messages: OpenAI's schemas, and their conversion to what a chat template reads.

Text only. Control tokens are removed from everything a client sent, so that no message can end its turn early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.errors import InvalidRequest
from tandem_frontend.openai.call_arguments import as_object
from tandem_frontend.openai.common_params import History, Many, only


class TextPart(History):
    """A text part, the only kind that the models here support. The other names are those of the Responses API."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(History):
    """What the model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class ThoughtPart(History):
    """Thoughts of an earlier message, as other servers return them. Ignored, as templates ignore old thoughts."""

    type: Literal["thinking", "reasoning", "redacted_thinking"]


Content = str | Annotated[Many[TextPart], Field(min_length=1)]
AssistantPart = Annotated[TextPart | RefusalPart | ThoughtPart, Field(discriminator="type")]


class SentMessage(History):
    """Base of the messages. Attachments would be read by a model that supports them, so they are rejected."""

    name: str | None = None
    images: Annotated[None, only([])] = None
    audio: Annotated[None, only([])] = None
    files: Annotated[None, only([])] = None
    attachments: Annotated[None, only([])] = None


class SystemMessage(SentMessage):
    """Instructions for the model. `developer` is OpenAI's newer name of the role."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(SentMessage):
    """A message of the end user."""

    role: Literal["user"]
    content: Content


class CalledFunction(History):
    """A function the model called."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(History):
    """A tool call the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(SentMessage):
    """An earlier message of the model."""

    role: Literal["assistant"]
    content: str | Many[AssistantPart] | None = None
    tool_calls: Many[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: Annotated[None, only({})] = None
    prefix: Annotated[None, only(False)] = None
    partial: Annotated[None, only(False)] = None


class ToolMessage(SentMessage):
    """The result of a tool call."""

    role: Literal["tool"]
    content: str | Many[TextPart] | None = None
    tool_call_id: str


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
    rendered: dict[str, Any] = {"role": role, "content": clean(_text(message))}
    if message.name is not None:
        rendered["name"] = clean(message.name)
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = clean(message.tool_call_id)
    if isinstance(message, AssistantMessage):
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
    """A tool call. Its arguments are JSON text: read before cleaning, because escapes can hide a control token."""
    try:
        arguments = without_control(as_object(call.function.arguments), clean)
    except RecursionError:
        raise InvalidRequest(f"{path}.function.arguments", "is nested too deeply") from None
    function = {"name": clean(call.function.name), "arguments": arguments}
    return {"id": clean(call.id), "type": "function", "function": function}


def _text(message: Any) -> str:
    """The text of a message. A refusal is what the model said, where it said nothing else."""
    content = message.content or ""
    text = content if isinstance(content, str) else "\n".join(_texts(content))
    return text or getattr(message, "refusal", None) or ""


def _texts(parts: Sequence[Any]) -> list[str]:
    return [
        part.refusal if isinstance(part, RefusalPart) else part.text
        for part in parts
        if not isinstance(part, ThoughtPart)
    ]
