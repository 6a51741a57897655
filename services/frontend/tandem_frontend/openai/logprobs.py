"""Log probabilities in OpenAI's two formats, with the text and bytes of each token.

A token can be part of a character. It is then named by its bytes (docs/reference/openai.md), so that no two tokens look
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem_frontend.preparation.tokenizer import Tokenizer

LOWEST = -9999.0
"""Replaces minus infinity, which JSON cannot express."""
PART = "bytes:"
"""Prefix of the name of a token that is part of a character."""


class TokenTexts:
    """Names of tokens in log probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return self._tokenizer.eos_token_ids

    def text(self, token_id: int) -> str:
        """The token's text; for a special token its name."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._name(token_id)
        return text

    def shown_chars(self, token_id: int) -> int:
        """Characters it adds to the text by itself: 0 for a special token and for part of a character."""
        return 0 if self.text(token_id).startswith(PART) else len(self._tokenizer.decode((token_id,)))

    def _name(self, token_id: int) -> str:
        own = self._tokenizer.token_bytes(token_id)
        try:
            own.decode()
        except UnicodeDecodeError:
            return PART + "".join(f"\\x{byte:02x}" for byte in own)
        return self._tokenizer.decode((token_id,), skip_special_tokens=False)

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """One entry of a chat completion's log probabilities."""
        text = self.text(token_id)
        return {
            "token": text,
            "logprob": max(logprob, LOWEST),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class StopFilter:
    """Drops the stop token at the end of a choice, which is not part of its text."""

    def __init__(self, request: pb.GenerateRequest, eos_token_ids: Sequence[int]) -> None:
        eos = () if request.stopping.ignore_eos else eos_token_ids
        self._stop_token_ids = frozenset((*request.stopping.stop_token_ids, *eos))

    def keep(self, logprobs: Sequence[generation_pb2.TokenLogprob]) -> Sequence[generation_pb2.TokenLogprob]:
        """The log probabilities of tokens that are part of the text."""
        return [entry for entry in logprobs if entry.token_id not in self._stop_token_ids]


def chat_logprobs(logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Log probabilities of one delta, or of a whole message, in the chat format."""
    content = [
        {
            **texts.entry(entry.token_id, entry.logprob),
            "top_logprobs": [texts.entry(alternative.token_id, alternative.logprob) for alternative in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts, end_chars: int
) -> dict[str, list[Any]]:
    """Log probabilities of one chunk in the completions format; the text up to its end has `end_chars` characters."""
    offsets: list[int] = []
    for entry in reversed(logprobs):
        # Backwards from the end of the text: how many characters tokens of partial characters make is known only there.
        end_chars = max(0, end_chars - texts.shown_chars(entry.token_id))
        offsets.append(end_chars)
    return {
        "tokens": [texts.text(entry.token_id) for entry in logprobs],
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in logprobs],
        "top_logprobs": [
            {texts.text(alternative.token_id): max(alternative.logprob, LOWEST) for alternative in entry.top}
            for entry in logprobs
        ],
        "text_offset": offsets[::-1],
    }
