"""A conversation with a tool call and its answer."""

from __future__ import annotations

from typing import Any

ARGUMENTS = {"city": "Köln", "days": 3}


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "text", "text": "18"}, {"type": "text", "text": "°C"}],
        },
        {"role": "user", "content": "And tomorrow?"},
    ]
