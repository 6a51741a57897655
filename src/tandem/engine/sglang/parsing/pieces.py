"""Splits a model's text into pieces at positions that depend on the text only, not on how it arrives.

The results of SGLang's detectors depend on how the text is split: most lose text when a whole call arrives at once,
some when a marker arrives in two parts. They are written for pieces the size of tokens: tags, words, characters.
"""

from __future__ import annotations

import re

TAG_CHARS_MAX = 160
"""Longer than the tag of any detector; a longer match is not treated as a tag."""
WORD_CHARS_MAX = 16

# Excludes comparisons and shifts in content: "a < b", "a <= b", "1<2", "x << y".
_TAG = rf"<[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}}>"
_BRACKET = r"\[/?[A-Z_]{1,20}\]"
_WORD = rf"[A-Za-z0-9_]{{1,{WORD_CHARS_MAX}}}"
_PIECE = re.compile(f"{_TAG}|{_BRACKET}|{_WORD}|.", re.DOTALL)
_UNDECIDED = re.compile(
    rf"(?:<(?:[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}})?|\[/?[A-Z_]{{0,20}}|[A-Za-z0-9_]{{1,{WORD_CHARS_MAX - 1}}})\Z"
)


class Pieces:
    """Splits one stream."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str]:
        """The pieces that are complete now; a piece that may still grow is held back."""
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
        """Release the partial word that is held back; "" if a possible tag or nothing is held."""
        if not self._held or self._held[0] in "<[":
            return ""
        word, self._held = self._held, ""
        return word

    def flush(self) -> list[str]:
        """The remaining pieces, at the end of the stream."""
        text, self._held = self._held, ""
        return _PIECE.findall(text)
