"""Token ids to text, a piece at a time: only whole characters, and each character once.

A token may be a part of a character. Where a tokenizer's decoding is joining (`token_table`), a stream looks its tokens
up and keeps the up to three bytes of an unfinished character. For every other tokenizer it decodes a short window of
tokens and gives out what is new in it. Either way the text does not depend on how the tokens come, one by one or many
together, and a token's work does not depend on the tokens before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tandem_frontend.response.token_table import REPLACEMENT, Piece, TokenTable

__all__ = ["REPLACEMENT", "Decoder", "Detokenizer"]

CONTEXT_TOKENS = 6
"""Tokens of the prompt that go before the first window: a decoder drops a leading space at its very beginning."""
TABLE_CONTEXT_TOKENS = 64
"""The same with a table: most of a prompt's end may be special tokens, which have no text."""
PARTIAL_BYTES_MAX = 3
"""An unfinished character has at most three bytes, and so at most three tokens."""
WINDOW_TOKENS_MAX = 32
"""A run of bytes that does not become text is given out as it is after so many tokens; a step's work stays bounded."""


class Decoder(Protocol):
    """What a tokenizer must offer. One that has a `token_table: TokenTable | None` besides is read by it."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...


class Detokenizer:
    """One stream's text."""

    __slots__ = ("_errors", "_pending", "_pieces", "_window")

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        table: TokenTable | None = getattr(decoder, "token_table", None)
        self._pieces: Sequence[Piece] = ()
        self._errors = ""
        self._pending = b""
        """An unfinished character's bytes."""
        self._window: _Window | None = None
        if table is not None:
            self._pieces = table.shown if skip_special_tokens else table.whole
            self._errors = table.errors
            begun = self._take_prompt(prompt_ids)
            if begun or not table.drops_first_space:
                return
        self._window = _Window(decoder, prompt_ids, skip_special_tokens=skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with the next tokens; may be empty. An id that the tokenizer lacks has no text."""
        if self._window is not None:
            return self._window.push(token_ids)
        pieces, count = self._pieces, len(self._pieces)
        if len(token_ids) == 1:
            token_id = token_ids[0]
            piece = pieces[token_id] if 0 <= token_id < count else ""
            # By far the most tokens come alone, and are text by themselves.
            return piece if type(piece) is str and not self._pending else self._decode(_bytes(piece))
        found = [pieces[token_id] for token_id in token_ids if 0 <= token_id < count]
        if not self._pending:
            try:
                return "".join(found)  # type: ignore[arg-type]
            except TypeError:
                pass  # one is bytes
        return self._decode(b"".join(map(_bytes, found)))

    def flush(self) -> str:
        """What is left at the end of the stream: replacement characters for bytes that never became one."""
        if self._window is not None:
            return self._window.flush()
        rest, self._pending = self._pending, b""
        return rest.decode(errors=self._errors)

    def _decode(self, own: bytes) -> str:
        own = self._pending + own
        text, used_bytes = codecs.utf_8_decode(own, self._errors, False)
        self._pending = own[used_bytes:]
        return text

    def _take_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Keep the character that a prompt's end has begun; returns whether it has any text there."""
        end = b""
        pieces, count = self._pieces, len(self._pieces)
        for token_id in reversed(prompt_ids[-TABLE_CONTEXT_TOKENS:]):
            piece = pieces[token_id] if 0 <= token_id < count else ""
            end = _bytes(piece) + end
            # Where a character begins can be seen in its first byte, so what was before it does not matter.
            if len(end) >= PARTIAL_BYTES_MAX or (isinstance(piece, str) and piece):
                break
        self._pending = end[codecs.utf_8_decode(end, self._errors, False)[1] :]
        return bool(end)


def _bytes(piece: Piece) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


class _Window:
    """The text of a stream whose decoder is not understood: it may look at the tokens around a token.

    Each step decodes a short window of tokens and gives out what is new in it, but for replacement characters at its
    end: the bytes behind them may still become a character.
    """

    __slots__ = ("_decoder", "_given_chars", "_ids", "_old_tokens", "_skip_special_tokens")

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt_ids)
        self._old_tokens = len(self._ids) - self._unfinished_tokens()
        """Tokens at the window's start whose text has been given out; they are only context."""
        self._given_chars = len(self._decode(self._ids[: self._old_tokens]))

    def push(self, token_ids: Sequence[int]) -> str:
        # One by one: how many come together must not decide what a run of bytes is worth waiting for.
        return "".join([self._push(token_id) for token_id in token_ids])

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        certain_chars = len(text.rstrip(REPLACEMENT))
        if len(self._ids) - self._old_tokens > WINDOW_TOKENS_MAX:
            certain_chars = len(text)
        certain = text[self._given_chars : certain_chars]
        if certain_chars == len(text):
            self._move(len(text))
        else:
            # A decoder may have taken back what it showed: some replace a whole run of bytes until its end is valid.
            self._given_chars = max(self._given_chars, certain_chars)
        return certain

    def flush(self) -> str:
        text = self._decode(self._ids)
        rest = text[self._given_chars :]
        self._given_chars = len(text)
        return rest

    def _move(self, text_chars: int) -> None:
        """Everything is given out: the newest tokens, which end with a whole character, are the context of the next."""
        fresh = self._ids[self._old_tokens :]
        fresh_chars = len(self._decode(fresh))
        if fresh_chars:
            self._ids = fresh
        elif len(self._ids) > WINDOW_TOKENS_MAX:
            # Special tokens alone are no context: behind them a decoder would take a text's beginning to be.
            del self._ids[self._old_tokens :]
        self._old_tokens = len(self._ids)
        self._given_chars = fresh_chars or text_chars

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character on where there is one near."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + PARTIAL_BYTES_MAX + 1):
            context = list(prompt_ids[-count:])
            if not self._decode(context).startswith(REPLACEMENT):
                return context
        return list(prompt_ids[-CONTEXT_TOKENS:])

    def _unfinished_tokens(self) -> int:
        """Tokens at the window's end that begin a character and do not finish it."""
        for count in range(min(PARTIAL_BYTES_MAX, len(self._ids)) + 1):
            if not self._decode(self._ids[: len(self._ids) - count]).endswith(REPLACEMENT):
                return count
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
