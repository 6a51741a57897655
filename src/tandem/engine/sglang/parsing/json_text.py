"""Mends the JSON text of one call's arguments while it streams.

Owns the guarantee that what leaves is valid JSON in valid UTF-8, or the beginning of it. SGLang's detectors copy what a
model wrote: NaN, bare words, raw line breaks, half a surrogate pair, text behind the last bracket.
"""

from __future__ import annotations

import json
import re

from tandem.engine.sglang.parsing.surrogates import REPLACEMENT, has_surrogates, without_surrogates

_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_SPACE = re.compile(r"[ \t\r\n]+")
_BARE_VALUE = re.compile(r"[^,\]}\n]+")
_BARE_KEY = re.compile(r"[^:,\]}\n]+")
_LITERAL = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_WORDS = {
    **dict.fromkeys(("nan", "-nan", "+nan", "inf", "+inf", "-inf", "none", "undefined"), "null"),
    **dict.fromkeys(("infinity", "+infinity", "-infinity", "nil", "null"), "null"),
    "true": "true",
    "false": "false",
}
"""Words that are no JSON but have a JSON value, in lower case. JSON has no infinite number: null."""
_CLOSERS = {"{": "}", "[": "]"}
ESCAPE_CHARS = 6


class JsonText:
    """One JSON value. `push` returns text that can be sent; everything behind the value's end is dropped."""

    def __init__(self) -> None:
        self._open: list[str] = []
        """Brackets that are open."""
        self._next = "value"
        """What JSON's grammar expects next: key, colon, value, comma, or nothing behind the value."""
        self._comma = ""
        """A comma and white space that are sent with what follows: in front of a bracket they would be invalid."""
        self._in_string = False
        self._bare: list[str] = []
        """An unquoted word so far."""
        self._tail = ""
        """The beginning of an escape or of a surrogate pair."""

    def push(self, text: str) -> str:
        """Read the next text; returns the next text to send, which may be empty."""
        text, self._tail = self._tail + text, ""
        out: list[str] = []
        at = 0
        while at < len(text) and self._next:
            at = self._string(text, at, out) if self._in_string else self._between(text, at, out)
        return "".join(out)

    def finish(self) -> str:
        """End the text; returns the rest. Open strings and brackets stay open: closing them would invent arguments."""
        out: list[str] = []
        if self._bare and not self._open:
            self._end_bare(out)
        return "".join(out)

    def _string(self, text: str, at: int, out: list[str]) -> int:
        """Read inside a string; returns where to go on."""
        if plain := _PLAIN.match(text, at):
            out.append(plain[0])
            return plain.end()
        char = text[at]
        if char == '"':
            out.append(char)
            self._in_string = False
            self._ended()
            return at + 1
        if char == "\\":
            return self._escape(text, at, out)
        if char < " ":
            out.append(json.dumps(char)[1:-1])
            return at + 1
        # A raw surrogate: two may be one character, in two fragments.
        if char < "\udc00" and at + 1 == len(text):
            self._tail = char
            return len(text)
        pair = text[at : at + 2] if char < "\udc00" and "\udc00" <= text[at + 1] <= "\udfff" else char
        out.append(without_surrogates(pair))
        return at + len(pair)

    def _escape(self, text: str, at: int, out: list[str]) -> int:
        left = len(text) - at
        whole = 2 * ESCAPE_CHARS if _HIGH.match(text, at) else ESCAPE_CHARS if text[at + 1 : at + 2] == "u" else 2
        if left < whole and (whole < 2 * ESCAPE_CHARS or _may_be_low(text[at + ESCAPE_CHARS :])):
            self._tail = text[at:]
            return len(text)
        if _HIGH.match(text, at):
            if low := _LOW.match(text, at + ESCAPE_CHARS):
                out.append(text[at : low.end()])
                return low.end()
            out.append(REPLACEMENT)
            return at + ESCAPE_CHARS
        if _LOW.match(text, at):
            out.append(REPLACEMENT)
            return at + ESCAPE_CHARS
        if known := _ESCAPE.match(text, at):
            out.append(known[0])
            return known.end()
        out.append("\\\\")
        return at + 1

    def _between(self, text: str, at: int, out: list[str]) -> int:
        """Read outside of strings; returns where to go on."""
        char = text[at]
        if self._bare or char not in '{}[]",: \t\r\n':
            return self._bare_word(text, at, out)
        if space := _SPACE.match(text, at):
            if self._comma:
                self._comma += space[0]
            else:
                out.append(space[0])
            return space.end()
        match char:
            case '"':
                self._begin(out)
                out.append(char)
                self._in_string = True
            case "{" | "[":
                self._bracket(char, out)
            case "}" | "]":
                self._close(char, out)
            case ",":
                self._fill(out)
                if self._next == "comma":
                    self._comma, self._next = char, "key" if self._open[-1] == "{" else "value"
            case _:
                if self._next == "colon":
                    out.append(char)
                    self._next = "value"
        return at + 1

    def _bare_word(self, text: str, at: int, out: list[str]) -> int:
        pattern = _BARE_KEY if self._expects_key() else _BARE_VALUE
        if word := pattern.match(text, at):
            self._bare.append(word[0])
            at = word.end()
        if at < len(text):
            self._end_bare(out)
        return at

    def _end_bare(self, out: list[str]) -> None:
        word = without_surrogates("".join(self._bare).strip())
        self._bare.clear()
        if not word:
            return
        is_key = self._expects_key()
        self._begin(out)
        value = word if _LITERAL.fullmatch(word) else _WORDS.get(word.lower(), "")
        out.append(json.dumps(word, ensure_ascii=False) if is_key or not value else value)
        self._ended()

    def _expects_key(self) -> bool:
        return bool(self._open) and self._open[-1] == "{" and self._next in ("key", "comma")

    def _begin(self, out: list[str]) -> None:
        """Send what must precede a value or a key: the comma that was held, or one that is missing."""
        if self._next == "comma":
            self._comma, self._next = ",", "key" if self._open[-1] == "{" else "value"
        if self._next == "colon":
            out.append(":")
            self._next = "value"
        out.append(self._comma)
        self._comma = ""

    def _bracket(self, char: str, out: list[str]) -> None:
        # A bracket where a key belongs is noise: what it holds is read as if it stood here.
        if self._expects_key():
            return
        self._begin(out)
        out.append(char)
        self._open.append(char)
        self._next = "key" if char == "{" else "value"

    def _close(self, char: str, out: list[str]) -> None:
        if not any(_CLOSERS[opening] == char for opening in self._open):
            return
        while True:
            self._fill(out)
            self._comma = ""
            closer = _CLOSERS[self._open.pop()]
            out.append(closer)
            self._next = "value"
            self._ended()
            if closer == char:
                return

    def _fill(self, out: list[str]) -> None:
        """Complete a key without a value."""
        if not self._open or self._open[-1] != "{" or self._next not in ("colon", "value"):
            return
        out.append(": null" if self._next == "colon" else "null")
        self._next = "comma"

    def _ended(self) -> None:
        """A string, a word or a bracket has ended."""
        if not self._open:
            self._next = ""
        elif self._open[-1] == "{" and self._next == "key":
            self._next = "colon"
        else:
            self._next = "comma"


def _may_be_low(text: str) -> bool:
    """Whether the text is the beginning of an escaped low surrogate."""
    return len(text) < ESCAPE_CHARS and bool(_LOW.match(text + "\\udc00"[len(text) :]))


def is_valid(text: str) -> bool:
    """Whether the text is one whole JSON value without NaN, infinite numbers and lone surrogates."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return not has_surrogates(json.dumps(value, ensure_ascii=False))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
