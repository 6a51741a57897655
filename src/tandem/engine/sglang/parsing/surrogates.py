"""Halves of surrogate pairs in text: such text has no UTF-8, so it can be neither sent nor stored."""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
ESCAPED_REPLACEMENT = "\\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(r"\A\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def has_surrogates(text: str) -> bool:
    """Whether the text contains a surrogate."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def without_surrogates(text: str) -> str:
    """The text with two halves of one pair as the character that they are, and every other half as U+FFFD."""
    if not has_surrogates(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class EscapedHalves:
    """Replaces escaped halves of surrogate pairs in JSON text by an escaped U+FFFD, piece by piece (see `pieces`).

    JSON's grammar allows a lone half and orjson does not, so a detector would never see the end of such a call.
    """

    def __init__(self) -> None:
        self._held = ""
        """A backslash, or an escaped high half and perhaps the backslash behind it."""

    def push(self, piece: str) -> str:
        """The text that is decided now."""
        if not self._held and piece != "\\":
            return piece
        text, self._held = self._held + piece, ""
        return self._take(text)

    def _take(self, text: str) -> str:
        if text == "\\" or _HIGH.fullmatch(text.removesuffix("\\")):
            self._held = text
            return ""
        high = _HIGH.match(text)
        if high is None or _LOW.match(text, high.end()):
            return text if high else _decided(text)
        # The rest may begin an escape itself.
        return ESCAPED_REPLACEMENT + self._take(text[high.end() :])

    def flush(self) -> str:
        """The rest, at the end of the text."""
        text, self._held = self._held, ""
        return _decided(text)


def _decided(text: str) -> str:
    """The text without an escaped half at its beginning."""
    return _HALF.sub(lambda _: ESCAPED_REPLACEMENT, text, count=1)
