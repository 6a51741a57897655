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

    def bytes(self, token_id: int) -> bytes:
        """The token's bytes."""
        return self._tokenizer.token_bytes(token_id)

    def shown_bytes(self, token_id: int) -> int:
        """Bytes that it adds to the text: 0 for a special token."""
        return len(self.bytes(token_id)) if self._tokenizer.decode((token_id,)) else 0

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


class VisibleTokens:
    """The log probabilities of one choice whose tokens are part of its text.

    Drops the stop token, and what a stop string has cut off: the token in which the string begins keeps what is left of
    it (`cut`). Where there are stop strings, entries wait for their text.
    """

    def __init__(self, request: pb.GenerateRequest, texts: TokenTexts) -> None:
        self._texts = texts
        eos = () if request.stopping.ignore_eos else texts.eos_token_ids
        self._stop_token_ids = frozenset((*request.stopping.stop_token_ids, *eos))
        self._has_stops = bool(request.stopping.stop)
        self._waiting: list[generation_pb2.TokenLogprob] = []
        self._missing_bytes = 0
        """Bytes of text that were sent beyond those of the entries."""
        self.cut: str | None = None
        """What is left of the last entry's token; None: all of it."""

    def take(self, chunk: pb.GenerateChunk) -> Sequence[generation_pb2.TokenLogprob]:
        """The entries whose text has been sent, after one more chunk."""
        kept = [entry for entry in chunk.logprobs if entry.token_id not in self._stop_token_ids]
        if not self._has_stops:
            return kept
        self._waiting += kept
        self._missing_bytes += len(chunk.text.encode())
        count = 0
        for entry in self._waiting:
            size_bytes = self._texts.shown_bytes(entry.token_id)
            if size_bytes > self._missing_bytes:
                break
            self._missing_bytes -= size_bytes
            count += 1
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return ready

    def end(self, finish: pb.GenerateFinish) -> Sequence[generation_pb2.TokenLogprob]:
        """The last entries. All of them, unless a stop string has cut the text."""
        rest, self._waiting = self._waiting, []
        if not finish.matched_stop.HasField("stop"):
            return rest
        if not rest or not self._missing_bytes:
            return ()
        own = self._texts.bytes(rest[0].token_id)[: self._missing_bytes]
        self.cut = own.decode(errors="replace")
        return rest[:1]


def chat_logprobs(
    logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts, cut: str | None = None
) -> dict[str, Any]:
    """Log probabilities of one delta, or of a whole message, in the chat format. `cut`: see `VisibleTokens`."""
    content = [
        {
            **texts.entry(entry.token_id, entry.logprob),
            "top_logprobs": [texts.entry(alternative.token_id, alternative.logprob) for alternative in entry.top],
        }
        for entry in logprobs
    ]
    if cut is not None:
        content[-1] |= {"token": cut, "bytes": list(cut.encode())}
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[generation_pb2.TokenLogprob], texts: TokenTexts, end_chars: int, cut: str | None = None
) -> dict[str, list[Any]]:
    """Log probabilities of one chunk in the completions format; the text up to its end has `end_chars` characters.

    `cut`: see `VisibleTokens`.
    """
    tokens = [texts.text(entry.token_id) for entry in logprobs]
    sizes = [texts.shown_chars(entry.token_id) for entry in logprobs]
    if cut is not None:
        tokens[-1], sizes[-1] = cut, len(cut)
    offsets: list[int] = []
    for size in reversed(sizes):
        # Backwards from the end of the text: how many characters tokens of partial characters make is known only there.
        end_chars = max(0, end_chars - size)
        offsets.append(end_chars)
    return {
        "tokens": tokens,
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in logprobs],
        "top_logprobs": [
            {texts.text(alternative.token_id): max(alternative.logprob, LOWEST) for alternative in entry.top}
            for entry in logprobs
        ],
        "text_offset": offsets[::-1],
    }
