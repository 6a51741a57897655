"""The tokens a request took, over all its choices, in OpenAI's words."""

from __future__ import annotations

from typing import Any

from tandem.api.types.v1 import generation_pb2


class UsageSum:
    """Adds up the usage of finished choices. A prompt counts once, however many choices answer it."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._choices_per_prompt = choices_per_prompt
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0

    def add(self, choice: int, usage: generation_pb2.Usage) -> None:
        """The usage of one choice, by its number."""
        prompt = choice // self._choices_per_prompt
        self._prompt_tokens[prompt] = usage.prompt_tokens
        # Choices of one prompt find each other's prefix; what the first of them found is what was cached before.
        cached = self._cached_tokens.get(prompt, usage.cached_tokens)
        self._cached_tokens[prompt] = min(cached, usage.cached_tokens)
        self._completion_tokens += usage.completion_tokens

    def told(self) -> dict[str, Any]:
        """As OpenAI tells it."""
        prompt_tokens = sum(self._prompt_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }
