"""How many JSON values a long body may have: parsing takes microseconds for each, and the event loop waits for it."""

from __future__ import annotations

from typing import Any

from tandem.errors import InvalidRequest

VALUES_MAX = 16_384
"""Objects, arrays, names of members, texts and numbers. 2,048 messages of two fields each have 10,240."""
INLINE_VALUES_MAX = 2_000
"""More are counted, and validated, in the process first."""
INLINE_BYTES_MAX = 256 * 2**10
"""A longer body goes there too, because even one text is unescaped byte by byte."""
PROMPT_IDS_MAX = 65_536
"""Token ids in `prompt` or `input`, which cost less each, where the model's context has no more."""


def is_inline(data: bytes) -> bool:
    """Whether a body is parsed within a few milliseconds. Marks inside texts count too, so that it reads no JSON."""
    if len(data) > INLINE_BYTES_MAX:
        return False
    return len(data) <= INLINE_VALUES_MAX or data.count(b",") + data.count(b"{") + data.count(b"[") <= INLINE_VALUES_MAX


def check_values(body: Any, prompt_ids_max: int) -> None:
    """Count the values of a parsed body.

    Raises:
        InvalidRequest: there are too many.
    """
    if not isinstance(body, dict):
        return
    ids = 0
    for field in ("prompt", "input"):
        given = body.get(field)
        lists = given if isinstance(given, list) else []
        own = sum(len(each) if isinstance(each, list) else isinstance(each, int) for each in lists)
        if own > prompt_ids_max:
            raise InvalidRequest(field, f"has {own} token ids; the limit of one request is {prompt_ids_max}")
        ids += own
    count = _count(body, VALUES_MAX + ids) - ids
    if count > VALUES_MAX:
        raise InvalidRequest("body", f"has more than {VALUES_MAX} JSON values")


def _count(value: Any, most: int) -> int:
    """The values below a value, its own included; stops a little beyond `most`."""
    count, left = 0, [value]
    while left and count <= most:
        at = left.pop()
        children = at.values() if isinstance(at, dict) else at if isinstance(at, list) else ()
        count += 1 + (len(children) if isinstance(at, dict) else 0)
        left.extend(children)
    return count
