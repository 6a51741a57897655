"""Arguments of earlier tool calls, as chat templates read them: an object, whatever the client sends back.

A model may write arguments that are no JSON object: cut off by max_tokens, with a raw line break, `null`. The response
hands them out as they are, so a client sends them back in its next request, and must not be refused for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

UNREADABLE = "arguments"
"""The one key of the object that stands for arguments which are no object: its value is what the model wrote."""
REPAIRED_CHARS_MAX = 65_536
"""Longer texts that are no JSON are not repaired: each attempt reads all of it."""

_OPEN_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?$")
_OPEN_WORD = re.compile(r"[\w.+-]+$")


def as_object(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """The arguments as an object that can be encoded in UTF-8.

    Args:
        given: JSON text as OpenAI has it, the object itself as other servers have it, or nothing.
    """
    if given is None or given == "":
        return {}
    try:
        value = _read(given) if isinstance(given, str) else given
        if value is None:
            return {}
        return _encodable(value if isinstance(value, dict) else {UNREADABLE: value})
    except (ValueError, RecursionError):
        return _encodable({UNREADABLE: given})


def _read(text: str) -> Any:
    """The value of a JSON text; of one that is cut off, what there is of it.

    Raises:
        ValueError: it is no JSON, and not the beginning of any.
    """
    try:
        # Not strict: models write line breaks into strings without escaping them.
        return json.loads(text, strict=False)
    except json.JSONDecodeError:
        if len(text) > REPAIRED_CHARS_MAX:
            raise
    for attempt in _completed(text.rstrip()):
        try:
            return json.loads(attempt, strict=False)
        except json.JSONDecodeError:
            continue
    raise ValueError("is no JSON")


def _completed(text: str) -> Iterator[str]:
    """Texts that the beginning of a JSON text may be completed to."""
    closing, in_string = _open_ends(text)
    if in_string:
        text = _OPEN_ESCAPE.sub("", text) if _ends_in_escape(text) else text
        yield text + '"' + closing
        # The string is a key.
        yield text + '": null' + closing
        return
    text = text.rstrip(", ")
    yield text + closing
    yield (text if text.endswith(":") else text + ":") + " null" + closing
    yield _OPEN_WORD.sub("null", text) + closing


def _open_ends(text: str) -> tuple[str, bool]:
    """The closing brackets that are missing, and whether a string is open."""
    missing: list[str] = []
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string, escaped = escaped or char != '"', not escaped and char == "\\"
        elif char == '"':
            in_string = True
        elif char in "{[":
            missing.append("}" if char == "{" else "]")
        elif char in "}]" and missing:
            missing.pop()
    return "".join(reversed(missing)), in_string


def _ends_in_escape(text: str) -> bool:
    """Whether the text ends within an escape sequence: an even number of backslashes is no beginning of one."""
    found = _OPEN_ESCAPE.search(text)
    if found is None:
        return False
    before = text[: found.start()]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 0


def _encodable(value: dict[str, Any]) -> dict[str, Any]:
    """The value, with U+FFFD for each half of a surrogate pair: JSON can contain one, UTF-8 cannot.

    Raises:
        RecursionError: it is nested too deeply to be rendered.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        encodable: dict[str, Any] = json.loads(text, strict=False)
        return encodable
    return value
