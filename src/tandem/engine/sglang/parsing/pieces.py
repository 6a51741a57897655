"""A model's text, cut into pieces at places that depend on the text alone, however it arrives.

SGLang's detectors answer differently to differently cut text: most lose something when a whole call comes at once,
some when a marker comes in two parts. Tags, words and single characters are what they are written for: they look like
tokens.
"""

from __future__ import annotations

import re

TAG_CHARS_MAX = 160
"""Longer than any detector's tag; what looks like a longer one is no tag."""
WORD_CHARS_MAX = 16

# A tag never begins like a comparison or a shift: "a < b", "a <= b", "1<2", "x << y".
_TAG = rf"<[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}}>"
_BRACKET = r"\[/?[A-Z_]{1,20}\]"
_WORD = rf"[A-Za-z0-9_]{{1,{WORD_CHARS_MAX}}}"
_PIECE = re.compile(f"{_TAG}|{_BRACKET}|{_WORD}|.", re.DOTALL)
_UNDECIDED = re.compile(
    rf"(?:<(?:[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}})?|\[/?[A-Z_]{{0,20}}|[A-Za-z0-9_]{{1,{WORD_CHARS_MAX - 1}}})\Z"
)


class Pieces:
    """Cuts one stream."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str]:
        """The pieces that are certain now; what may still grow is held back."""
        text = self._held + text
        pieces: list[str] = []
        at = 0
        while at < len(text) and not _UNDECIDED.match(text, at):
            piece = _PIECE.match(text, at)
            assert piece is not None, "any character is a piece"
            pieces.append(piece[0])
            at = piece.end()
        self._held = text[at:]
        return pieces

    def take_word(self) -> str:
        """The beginning of a word that is held back, and is from now on not; empty when something else is held."""
        if not self._held or self._held[0] in "<[":
            return ""
        word, self._held = self._held, ""
        return word

    def flush(self) -> list[str]:
        """The rest, at the end of the stream."""
        text, self._held = self._held, ""
        return _PIECE.findall(text)
