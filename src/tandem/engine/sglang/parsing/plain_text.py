"""Content that a detector must not see, because it would take it for the beginning of a call and hold all that follows.

Only `llama3` needs it: its calls may begin with a bare `{`, and so may a word of any content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PYTHON_TAG = "<|python_tag|>"
_SPACE = re.compile(r"\s+")


class BareObjects:
    """Finds out whether a `{` begins a call: at the start of a line, before the name of a tool of the request."""

    def __init__(self, names: Iterable[str]) -> None:
        self._begins = [
            begin.replace("'", quote)
            for name in names
            for begin in (f"{{'name':'{name}'", f"{{'type':'function','name':'{name}'")
            for quote in "\"'"
        ]
        """How a call begins, without white space."""
        self._tail = "\n"
        """The content's last character that is not a space."""
        self._held = ""
        self._is_call = False
        """Whether a call has begun: from then on the detector sees all text."""

    def push(self, piece: str) -> tuple[str, str]:
        """Text that is content, and text for the detector behind it."""
        if self._is_call or piece == _PYTHON_TAG:
            self._is_call = True
            return "", self.flush() + piece
        if not self._held and (piece != "{" or self._tail != "\n"):
            self._note(piece)
            return (piece, "") if "{" in piece else ("", piece)
        self._held += piece
        begin = _SPACE.sub("", self._held)
        if any(begin.startswith(known) for known in self._begins):
            self._is_call = True
            return "", self.flush()
        if any(known.startswith(begin) for known in self._begins):
            return "", ""
        self._note(self._held)
        return self.flush(), ""

    def flush(self) -> str:
        """The held text; at the end of the output it is content."""
        held, self._held = self._held, ""
        return held

    def _note(self, text: str) -> None:
        if kept := text.rstrip(" \t\r"):
            self._tail = kept[-1]
