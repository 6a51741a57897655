"""Encoding of responses: compact JSON, server-sent events, usage and finish reasons."""

from __future__ import annotations

import json
from typing import Any

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem_frontend.response.sse import CONTENT_TYPE, without_line_breaks


class UsageSum:
    """Sums the usage of finished choices. A prompt counts once, however many choices it has."""

    def __init__(self, choices_per_prompt: int, *, is_echo_only: bool = False) -> None:
        """`is_echo_only`: what was generated is not part of the response."""
        self._choices_per_prompt = choices_per_prompt
        self._is_echo_only = is_echo_only
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._open_tokens: dict[int, int] = {}
        """Tokens so far of each choice that has not finished."""

    def begin(self, choice: int, prompt_tokens: int) -> None:
        """A choice has begun. Needed only for `so_far`, like `count`."""
        self._prompt_tokens[choice // self._choices_per_prompt] = prompt_tokens

    def count(self, choice: int, tokens: int) -> None:
        """A choice has so many tokens more."""
        self._open_tokens[choice] = self._open_tokens.get(choice, 0) + tokens

    def add(self, choice: int, usage: generation_pb2.Usage) -> None:
        """The usage of one choice, by its number."""
        prompt = choice // self._choices_per_prompt
        self._prompt_tokens[prompt] = usage.prompt_tokens
        # Choices of one prompt hit each other's prefix in the cache; the smallest count is what was cached before.
        cached = self._cached_tokens.get(prompt, usage.cached_tokens)
        self._cached_tokens[prompt] = min(cached, usage.cached_tokens)
        self._completion_tokens += 0 if self._is_echo_only else usage.completion_tokens
        self._open_tokens.pop(choice, None)

    def so_far(self) -> dict[str, Any]:
        """The usage object of an event while choices are open; the cached tokens are known only at the end."""
        prompt_tokens = sum(self._prompt_tokens.values())
        tokens = self._completion_tokens + sum(self._open_tokens.values())
        return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt_tokens = sum(self._prompt_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }


REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def finish_reason(finish: pb.GenerateFinish, *, called_tools: bool = False) -> str:
    """OpenAI's finish reason; `tool_calls` where the model called a tool and stopped by itself."""
    reason = REASONS[finish.reason]
    return "tool_calls" if called_tools and reason == "stop" else reason


JSON = "application/json"
EVENTS = CONTENT_TYPE
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8, one line for every reader. Escapes only what it must.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return without_line_breaks(text).encode()


def whole(value: Any) -> httpbody_pb2.HttpBody:
    """The body of a response that is not streamed."""
    return httpbody_pb2.HttpBody(content_type=JSON, data=to_json(value))


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def around_choice(head: dict[str, Any], tail: dict[str, Any]) -> tuple[bytes, bytes]:
    """The bytes before and after the one choice of an event, encoded once for a stream of thousands of events."""
    begin = to_json(head)[:-1] + b',"choices":['
    end = to_json(tail)[1:]
    return b"data: " + begin, b"]" + (b"," if tail else b"") + end + b"\n\n"
