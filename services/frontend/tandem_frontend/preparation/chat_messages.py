"""Converts OpenAI's messages to the formats that chat templates expect.

Pure: values in, new values out. The endpoints have validated the messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tandem.errors import InvalidRequest

Message = Mapping[str, Any]


def readable(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The usual format: arguments of tool calls as objects, content never absent, a tool's result as one text.

    Raises:
        InvalidRequest: the arguments of a tool call are no JSON object; names the field.
    """
    return [_readable(number, message) for number, message in enumerate(messages)]


def with_text_arguments(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """For templates that concatenate arguments with text (DeepSeek's): arguments as JSON text again."""
    return [_with_arguments(message, _text_of) for message in messages]


def flat(tools: Iterable[Mapping[str, Any]]) -> list[Any]:
    """For templates that expect functions without OpenAI's wrapper object."""
    return [tool.get("function", tool) for tool in tools]


def _readable(number: int, message: Message) -> dict[str, Any]:
    def parsed(call: int, arguments: Any) -> Any:
        field = f"messages[{number}].tool_calls[{call}].function.arguments"
        if not isinstance(arguments, str):
            return arguments
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as problem:
            raise InvalidRequest(field, f"is not JSON: {problem}") from None
        if not isinstance(value, dict):
            raise InvalidRequest(field, "must be a JSON object")
        return value

    content = message.get("content")
    if message.get("role") == "tool" and isinstance(content, list) and all(_is_text(part) for part in content):
        content = " ".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    return {**_with_arguments(message, parsed), "content": "" if content is None else content}


def _with_arguments(message: Message, change: Any) -> dict[str, Any]:
    """A copy in which `change(number of the call, arguments)` replaces the arguments of each tool call."""
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, list):
        return dict(message)
    changed = []
    for number, call in enumerate(calls):
        function = dict(call.get("function") or {})
        if "arguments" in function:
            function["arguments"] = change(number, function["arguments"])
        changed.append({**call, "function": function})
    return {**message, "tool_calls": changed}


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")


def _text_of(call: int, arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
