"""Token ids to text, a piece at a time: only whole characters, and each character once.

A token may be a part of a character, and what it looks like depends on the token before it. So each step decodes a
short window of tokens and hands out what is new in it, but for replacement characters at its end: the bytes behind
them may still become a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens of the prompt that go before the first window: a decoder drops a leading space at its very beginning."""
PARTIAL_TOKENS_MAX = 3
"""An unfinished character has at most three bytes, and so at most three tokens."""
WINDOW_TOKENS_MAX = 32
"""A run of bytes that does not become text is given out as it is after so many tokens; a step's work stays bounded."""


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
        self._window = self._context(prompt_ids)
        self._old_tokens = len(self._window) - self._unfinished_tokens()
        """Tokens at the window's start whose text has been given out; they are only context."""
        self._given_chars = len(self._decode(self._window[: self._old_tokens]))

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with the next tokens; may be empty."""
        self._window += token_ids
        text = self._decode(self._window)
        certain_chars = len(text.rstrip(REPLACEMENT))
        if len(self._window) - self._old_tokens > WINDOW_TOKENS_MAX:
            certain_chars = len(text)
        certain = text[self._given_chars : certain_chars]
        if certain_chars == len(text):
            self._move_window()
        else:
            # A decoder may have taken back what it showed: some replace a whole run of bytes until its end is valid.
            self._given_chars = max(self._given_chars, certain_chars)
        return certain

    def flush(self) -> str:
        """What is left at the end of the stream: replacement characters for bytes that never became one."""
        text = self._decode(self._window)
        rest = text[self._given_chars :]
        self._given_chars = len(text)
        return rest

    def _move_window(self) -> None:
        """Everything is given out: the newest tokens, which end with a whole character, are the context of the next."""
        self._window = self._window[self._old_tokens :] or self._window
        self._old_tokens = len(self._window)
        self._given_chars = len(self._decode(self._window))

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character on where there is one near."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + PARTIAL_TOKENS_MAX + 1):
            context = list(prompt_ids[-count:])
            if not self._decode(context).startswith(REPLACEMENT):
                return context
        return list(prompt_ids[-CONTEXT_TOKENS:])

    def _unfinished_tokens(self) -> int:
        """Tokens at the window's end that begin a character and do not finish it."""
        for count in range(min(PARTIAL_TOKENS_MAX, len(self._window)) + 1):
            if not self._decode(self._window[: len(self._window) - count]).endswith(REPLACEMENT):
                return count
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
