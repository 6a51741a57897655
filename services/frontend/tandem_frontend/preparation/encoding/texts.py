"""Encodes one text: counts its tokens first where it may be far too long, then encodes it as a whole.

Blocks, but lets other threads run meanwhile. Knows neither requests nor models: the caller names the field of an error.
"""

from __future__ import annotations

import contextlib
import ctypes

import tokenizers

COUNTED_CHARS = 16_384
"""Size of the pieces in which a long text is counted."""


class TooManyTokens(Exception):
    """A text has more tokens than allowed."""


class TextEncoder:
    """Encodes texts of at most `tokens_max` tokens. The limit is not exact: counting in pieces can differ slightly."""

    def __init__(self, backend: tokenizers.Tokenizer, tokens_max: int) -> None:
        self._backend = backend
        self._tokens_max = tokens_max

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Control tokens in it become their token ids.

        Raises:
            TooManyTokens: raised before all tokens are in memory.
        """
        # A text has at most as many tokens as characters.
        if len(text) > self._tokens_max:
            self._check_count(text)
        return self._encoding(text, add_special_tokens).ids

    def _check_count(self, text: str) -> None:
        """Count the tokens of a long text with one piece in memory at a time."""
        count = 0
        for begin in range(0, len(text), COUNTED_CHARS):
            count += len(self._encoding(text[begin : begin + COUNTED_CHARS], False))
            if count > self._tokens_max:
                raise TooManyTokens(f"over {self._tokens_max} tokens")

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # encode_batch_fast() releases the interpreter's lock; encode() holds it to its end, which would stop the event
        # loop even from another thread.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def open_backend(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Raises:
        ValueError: the content is no tokenizer.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as problem:  # the library raises bare Exception
        raise ValueError(str(problem)) from None
    # A file may configure truncation and padding, which would change prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def trim_memory() -> None:
    """Return freed memory to the system after loading a tokenizer or a long text: up to half. On Linux only."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
