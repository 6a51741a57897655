"""Incremental detokenisation: only whole characters, and each character once.

A token may be a part of a character. Where a tokenizer decodes by joining (`token_table`), a stream looks its tokens up
and keeps the at most three bytes of an unfinished character. For every other tokenizer it decodes a short window of
tokens and returns what is new in it. Either way the text does not depend on whether tokens arrive one by one or many
together, and the cost of a token does not depend on the tokens before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tandem_frontend.response.token_table import REPLACEMENT, Piece, TokenTable

__all__ = ["REPLACEMENT", "Decoder", "Detokenizer"]

CONTEXT_TOKENS = 6
"""Prompt tokens before the first window: a decoder drops a leading space at the very beginning of a text."""
TABLE_CONTEXT_TOKENS = 64
"""The same with a table; more, because a prompt may end with many special tokens, which have no text."""
PARTIAL_BYTES_MAX = 3
"""An unfinished character has at most three bytes, and so at most three tokens."""
WINDOW_TOKENS_MAX = 32
"""Bytes that have not become text after this many tokens are returned as they are, so that a step's work is bounded."""


class Decoder(Protocol):
    """What a tokenizer must offer. If it also has a `token_table: TokenTable | None`, that is used."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...


class Detokenizer:
    """The text of one stream."""

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
        """Text that the next tokens complete; may be empty. A token id that the tokenizer does not have has no text."""
        if self._window is not None:
            return self._window.push(token_ids)
        pieces, count = self._pieces, len(self._pieces)
        if len(token_ids) == 1:
            token_id = token_ids[0]
            piece = pieces[token_id] if 0 <= token_id < count else ""
            # The usual case: a single token that is text by itself.
            return piece if type(piece) is str and not self._pending else self._decode(_bytes(piece))
        found = [pieces[token_id] for token_id in token_ids if 0 <= token_id < count]
        if not self._pending:
            try:
                return "".join(found)  # type: ignore[arg-type]
            except TypeError:
                pass  # one is bytes
        return self._decode(b"".join(map(_bytes, found)))

    def flush(self) -> str:
        """Text at the end of the stream: replacement characters for the bytes of an unfinished character."""
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
        """Keep the bytes of a character that the prompt leaves unfinished. Returns whether it ends with text."""
        end = b""
        pieces, count = self._pieces, len(self._pieces)
        for token_id in reversed(prompt_ids[-TABLE_CONTEXT_TOKENS:]):
            piece = pieces[token_id] if 0 <= token_id < count else ""
            end = _bytes(piece) + end
            # UTF-8 is self-synchronising: what is before the last three bytes does not matter.
            if len(end) >= PARTIAL_BYTES_MAX or (isinstance(piece, str) and piece):
                break
        self._pending = end[codecs.utf_8_decode(end, self._errors, False)[1] :]
        return bool(end)


def _bytes(piece: Piece) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


class _Window:
    """The text of a stream with an unknown decoder, in which a token's text may depend on its neighbours.

    Each step decodes a short window of tokens and returns what is new in it, without replacement characters at its end:
    later tokens may complete those characters.
    """

    __slots__ = ("_decoder", "_given_chars", "_ids", "_old_tokens", "_skip_special_tokens")

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt_ids)
        self._old_tokens = len(self._ids) - self._unfinished_tokens()
        """Tokens at the window's start whose text has been returned; they are only context."""
        self._given_chars = len(self._decode(self._ids[: self._old_tokens]))

    def push(self, token_ids: Sequence[int]) -> str:
        # One by one: the result must not depend on how many tokens arrive together.
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
        """All text is returned: the newest tokens, which end with a whole character, become the context of the next."""
        fresh = self._ids[self._old_tokens :]
        fresh_chars = len(self._decode(fresh))
        if fresh_chars:
            self._ids = fresh
        elif len(self._ids) > WINDOW_TOKENS_MAX:
            # Special tokens alone are no context: after them a decoder would assume the beginning of a text.
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
