"""What is done with a text to get its token ids: counted first where it may be far too long, then encoded whole.

Blocks until it is done, and lets other threads run meanwhile. Knows neither requests nor models: a refusal says how
many tokens were too many, and the caller names the field.
"""

from __future__ import annotations

import contextlib
import ctypes

import tokenizers

COUNTED_CHARS = 16_384
"""A text that may be longer than that is counted first, in pieces of this size."""


class TooManyTokens(Exception):
    """A text has more tokens than were allowed."""


class TextEncoder:
    """Encodes texts of at most `tokens_max` tokens; or of some more, where they are short."""

    def __init__(self, backend: tokenizers.Tokenizer, tokens_max: int) -> None:
        self._backend = backend
        self._tokens_max = tokens_max

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Control tokens in it are read as such.

        Raises:
            TooManyTokens: before they are held in memory.
        """
        # A character is a token at most.
        if len(text) > self._tokens_max:
            self._check_count(text)
        return self._encoding(text, add_special_tokens).ids

    def _check_count(self, text: str) -> None:
        """Count the tokens of a long text without holding more than a piece of them."""
        count = 0
        for begin in range(0, len(text), COUNTED_CHARS):
            count += len(self._encoding(text[begin : begin + COUNTED_CHARS], False))
            if count > self._tokens_max:
                raise TooManyTokens(f"over {self._tokens_max} tokens")

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # A batch, even of one, lets other threads run; encode() holds the interpreter's lock to its end, in whatever
        # thread it is, and the event loop waits.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def open_backend(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as problem:  # the library raises bare Exception
        raise ValueError(str(problem)) from None
    # A file may say that texts are cut or padded; here neither may happen unseen.
    backend.no_truncation()
    backend.no_padding()
    return backend


def trim_memory() -> None:
    """Give back what reading a tokenizer or a long text took: up to half of the process. On Linux only."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
