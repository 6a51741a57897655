"""Log probabilities in OpenAI's two shapes, and what a single token looks like there: its text and its bytes.

A token can be a part of a character. Its bytes are then its name (docs/reference/openai.md): no two look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem_frontend.preparation.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
PART = "bytes:"
"""Begins the name of a token that is a part of a character."""


class TokenTexts:
    """Tokens as log probabilities name them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens at which the model ends."""
        return self._tokenizer.eos_token_ids

    def text(self, token_id: int) -> str:
        """Its text; a special token's is its name."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._name(token_id)
        return text

    def shown_chars(self, token_id: int) -> int:
        """Characters it adds to a text by itself: none if it is a special token or a part of a character."""
        return 0 if self.text(token_id).startswith(PART) else len(self._tokenizer.decode((token_id,)))

    def _name(self, token_id: int) -> str:
        own = self._tokenizer.token_bytes(token_id)
        try:
            own.decode()
        except UnicodeDecodeError:
            return PART + "".join(f"\\x{byte:02x}" for byte in own)
        return self._tokenizer.decode((token_id,), skip_special_tokens=False)

    def named(self, token_id: int, logprob: float) -> dict[str, Any]:
        """One entry of chat's log probabilities."""
        text = self.text(token_id)
        return {
            "token": text,
            "logprob": max(logprob, LOWEST),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class StopFilter:
    """Leaves out the stop token at an answer's end, which is no part of its text."""

    def __init__(self, request: pb.GenerateRequest, eos_token_ids: Sequence[int]) -> None:
        eos = () if request.stopping.ignore_eos else eos_token_ids
        self._stop_token_ids = frozenset((*request.stopping.stop_token_ids, *eos))

    def keep(self, logprobs: Sequence[generation_pb2.TokenLogprob]) -> Sequence[generation_pb2.TokenLogprob]:
        """Those of tokens that are part of the text."""
        return [entry for entry in logprobs if entry.token_id not in self._stop_token_ids]


def chat_logprobs(logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Those of one delta, or of a whole message."""
    content = [
        {
            **texts.named(entry.token_id, entry.logprob),
            "top_logprobs": [texts.named(rival.token_id, rival.logprob) for rival in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts, end_chars: int
) -> dict[str, list[Any]]:
    """Those of one chunk, with which the answer's text has grown to `end_chars` characters."""
    offsets: list[int] = []
    for entry in reversed(logprobs):
        # Backwards from what has been given out: only then it is known which characters the parts became.
        end_chars = max(0, end_chars - texts.shown_chars(entry.token_id))
        offsets.append(end_chars)
    return {
        "tokens": [texts.text(entry.token_id) for entry in logprobs],
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in logprobs],
        "top_logprobs": [
            {texts.text(rival.token_id): max(rival.logprob, LOWEST) for rival in entry.top} for entry in logprobs
        ],
        "text_offset": offsets[::-1],
    }
