"""How answers look on the wire: JSON without spaces, and server-sent events."""

from __future__ import annotations

import json
from typing import Any

from google.api import httpbody_pb2

JSON = "application/json"
EVENTS = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON; every character as it is.

    Raises:
        ValueError: a number is none that JSON can say.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def whole(value: Any) -> httpbody_pb2.HttpBody:
    """An answer in one piece."""
    return httpbody_pb2.HttpBody(content_type=JSON, data=to_json(value))


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def around_choice(head: dict[str, Any], tail: dict[str, Any]) -> tuple[bytes, bytes]:
    """What comes before and behind the one choice of an event, for streams that send thousands of them."""
    begin = to_json(head)[:-1] + b',"choices":['
    end = to_json(tail)[1:]
    return b"data: " + begin, b"]" + (b"," if tail else b"") + end + b"\n\n"
