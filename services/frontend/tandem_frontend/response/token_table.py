"""The text of each token of a vocabulary, for tokenizers whose decoding only joins the texts of the tokens.

Decides whether a tokenizer is of that kind: its decoder must be a known one, and each token's text must equal what the
library decodes it to. Holds no state of a stream. For every other tokenizer there is no table, and `detokenizer`
decodes a window of tokens instead.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

REPLACEMENT = "\ufffd"
Piece = str | bytes
"""Text; or bytes, where a token is no text by itself: a part of a character, or invalid UTF-8."""

REPLACE_RUN, REPLACE_EACH = "replace", "tandem.replace_each_byte"
"""Error handlers for invalid bytes: one U+FFFD per maximal prefix of a character, or one per byte."""
BATCH_TOKENS = 8_192
"""Tokens decoded at a time: each is an object and a string meanwhile."""
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _replace_each(problem: UnicodeError) -> tuple[str, int]:
    assert isinstance(problem, UnicodeDecodeError), "used for decoding only"
    return REPLACEMENT * (problem.end - problem.start), problem.end


codecs.register_error(REPLACE_EACH, _replace_each)


def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers write printable bytes as themselves, and all others as letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BYTE_BY_LETTER = _byte_letters()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TokenTable:
    """The pieces of all tokens, by id. Joined and decoded as UTF-8, they are the text."""

    shown: Sequence[Piece]
    """Special tokens are empty."""
    whole: Sequence[Piece]
    """Special tokens have their names."""
    errors: str
    """How invalid bytes are decoded: an error handler of `codecs`."""
    drops_first_space: bool
    """Whether a space at the very beginning of a text is dropped; the pieces are only valid after other text then."""

    @classmethod
    def read(cls, backend: tokenizers.Tokenizer, token_count: int) -> TokenTable | None:
        """The table of a tokenizer with ids below `token_count`; None where decoding is not just joining."""
        spelling = _spelling(backend)
        anchor = None if spelling is None else _anchor(backend, token_count)
        if spelling is None or anchor is None:
            return None
        whole: list[Piece] = []
        for first in range(0, token_count, BATCH_TOKENS):
            whole += _pieces(backend, spelling, anchor, range(first, min(first + BATCH_TOKENS, token_count)))
        added = backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        shown = whole.copy()
        for token_id, token in added.items():
            if token.content in special:
                shown[token_id] = ""
        if not _is_right(backend, spelling, anchor, whole):
            return None
        return cls(shown, whole, spelling.errors, spelling.drops_first_space)


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a decoder turns a token's name into text."""

    piece: Callable[[str | None], Piece]
    errors: str
    drops_first_space: bool


def _spelling(backend: tokenizers.Tokenizer) -> _Spelling | None:
    """The spelling of a known decoder; None for every other one."""
    if backend.decoder is None:
        return None
    steps = list(_steps(json.loads(backend.decoder.__getstate__())))
    kinds = [step["type"] for step in steps]
    joined = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    strips = [step for step in steps[joined:] if step["type"] != "Fuse"]
    if strips and not _is_one_space(strips):
        return None
    match steps[:joined]:
        case [{"type": "ByteLevel"}] if not strips:
            return _Spelling(_byte_level, REPLACE_RUN, False)
        case [{"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme}] if not strips:
            return _Spelling(_replacing([(mark, " ")], bytes_too=False), REPLACE_EACH, scheme != "never")
    bytes_too = "ByteFallback" in kinds[:joined]
    replaced = steps[: joined - 1] if bytes_too and kinds[joined - 1] == "ByteFallback" else steps[:joined]
    pairs = [_replaced(step) for step in replaced]
    if not steps or None in pairs:
        return None
    return _Spelling(_replacing([pair for pair in pairs if pair], bytes_too=bytes_too), REPLACE_EACH, bool(strips))


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder, or those of a sequence, in order."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _is_one_space(strips: Sequence[dict[str, Any]]) -> bool:
    """Whether these steps drop one space at the beginning of the joined text, and nothing else."""
    return strips == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]


def _replaced(step: dict[str, Any]) -> tuple[str, str] | None:
    """(old, new) of a Replace step; None for any other step."""
    pattern = step.get("pattern")
    if step["type"] != "Replace" or not isinstance(pattern, dict) or not pattern.get("String"):
        return None
    return pattern["String"], step["content"]


def _byte_level(token: str | None) -> Piece:
    if token is None:
        return ""
    if all(letter in BYTE_BY_LETTER for letter in token):
        return _as_text(bytes(BYTE_BY_LETTER[letter] for letter in token))
    return token


def _replacing(pairs: Sequence[tuple[str, str]], *, bytes_too: bool) -> Callable[[str | None], Piece]:
    """A spelling by replacements, and by the byte that a byte token names."""

    def piece(token: str | None) -> Piece:
        for old, new in pairs:
            token = token and token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token or "") if bytes_too else None
        return token or "" if byte is None else _as_text(bytes([int(byte[1], 16)]))

    return piece


def _as_text(own: bytes) -> Piece:
    try:
        return own.decode()
    except UnicodeDecodeError:
        return own


def _anchor(backend: tokenizers.Tokenizer, token_count: int) -> int | None:
    """A token of plain letters to decode before each other token, so that no leading space is dropped."""
    for token_id in range(token_count):
        name = backend.id_to_token(token_id) or ""
        if name.isalpha() and name.isascii() and backend.decode([token_id]) == name:
            return token_id
    return None


def _pieces(backend: tokenizers.Tokenizer, spelling: _Spelling, anchor: int, token_ids: range) -> list[Piece]:
    """What the library decodes the tokens to; where that is no text, what the spelling makes of their names."""
    before = len(backend.decode([anchor]))
    texts = backend.decode_batch([[anchor, token_id] for token_id in token_ids], skip_special_tokens=False)
    return [
        spelling.piece(backend.id_to_token(token_id)) if REPLACEMENT in text else text[before:]
        for token_id, text in zip(token_ids, texts, strict=True)
    ]


def _is_right(backend: tokenizers.Tokenizer, spelling: _Spelling, anchor: int, whole: Sequence[Piece]) -> bool:
    """Whether the pieces made from names equal the library's, and every token has text where bytes have tokens.

    A token without text would end a run of byte tokens in the library, but not when pieces are joined.
    """
    before = backend.decode([anchor])
    for token_id, piece in enumerate(whole):
        if isinstance(piece, bytes) or REPLACEMENT in piece:
            text = piece if isinstance(piece, str) else piece.decode(errors=spelling.errors)
            if backend.decode([anchor, token_id], skip_special_tokens=False) != before + text:
                return False
        elif not piece and spelling.errors == REPLACE_EACH and backend.id_to_token(token_id) is not None:
            return False
    return True
