"""Token ids to text, a piece at a time: only whole characters, and each character once.

A token may be a part of a character, and what it looks like depends on the token before it. So each step decodes a
short window of tokens and hands out what is new in it, but for replacement characters at its end: the bytes behind
them may still become a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
PARTIAL_BYTES_MAX = 3
"""An unfinished character has at most three bytes; some decoders show each of them as a replacement character."""
CONTEXT_TOKENS = 6
"""Tokens of the prompt that go before the first window: a decoder drops a leading space at its very beginning."""
WINDOW_TOKENS_MAX = 48
"""A run of bytes that never becomes text is given out as it is, so that a step's work stays bounded."""


class Decoder(Protocol):
    """What a tokenizer must offer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...


class Detokenizer:
    """One stream's text."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._old_tokens = len(self._window)
        """Tokens at the window's start whose text has been given out; they are only context."""
        self._given_chars = len(self._decode(self._window).rstrip(REPLACEMENT))

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with the next tokens; may be empty."""
        self._window += token_ids
        text = self._decode(self._window)
        held_chars = _held_chars(text)
        if len(self._window) - self._old_tokens > WINDOW_TOKENS_MAX:
            held_chars = 0
        certain = text[self._given_chars : len(text) - held_chars]
        self._given_chars = max(self._given_chars, len(text) - held_chars)
        if not held_chars:
            self._move_window()
        return certain

    def flush(self) -> str:
        """What is left at the end of the stream: replacement characters for bytes that never became one."""
        text = self._decode(self._window)
        rest = text[self._given_chars :]
        self._given_chars = len(text)
        return rest

    def _move_window(self) -> None:
        """Everything is given out: the newest tokens are the context of the next ones."""
        self._window = self._window[self._old_tokens :] or self._window
        self._window = self._window[-CONTEXT_TOKENS:]
        self._old_tokens = len(self._window)
        self._given_chars = len(self._decode(self._window))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _held_chars(text: str) -> int:
    """Replacement characters at the end that may be bytes of an unfinished character."""
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(trailing, PARTIAL_BYTES_MAX)
