"""Follows the JSON of a call through its pieces: what is inside a string, and which brackets end a call.

A detector that reads a call from its beginning at each piece takes quadratic time, so `tool_text` feeds it every piece
only where the end of a call may stand. Owns no text but the current escape.
"""

from __future__ import annotations

OUTER_DEPTH = 1
"""Brackets at this depth open or close a call, or its arguments."""


class JsonState:
    """The state of one stream's calls."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, piece: str, *, inside: bool) -> tuple[str, bool]:
        """The piece as it can be fed, and whether it must be fed at once.

        Args:
            piece: the next one of `pieces`.
            inside: whether the detector holds text, which it does inside of calls. Outside, quotes mean nothing.
        """
        if not inside:
            self._depth, self._in_string, self._escaped = 0, False, False
        if self._in_string and piece.startswith("<"):
            # A tag inside of a string ends no call. Escaped, it is the same string for every detector.
            self._escaped = False
            return "\\u003c" + piece[1:] if "\\" not in piece and '"' not in piece else piece, False
        matters = False
        for char in piece:
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = self._depth > 0
            elif char in "{[":
                matters = matters or self._depth <= OUTER_DEPTH
                self._depth += 1
            elif char in "}]":
                self._depth = max(0, self._depth - 1)
                matters = matters or self._depth <= OUTER_DEPTH
            elif char in "<>()" and self._depth == 0:
                matters = True
        return piece, matters
