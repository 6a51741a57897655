"""Depth and size limits for a client's JSON, checked before any recursive processing.

Pure. Knows nothing of schemas: only an engine can determine whether one compiles. Checked by the frontend, and again by
the engine, because a worker may be called directly.
"""

from __future__ import annotations

from typing import Any

from tandem.errors import InvalidRequest

DEPTH_MAX = 64
VALUES_MAX = 2_000


def check_json_bounds(field: str, value: Any) -> None:
    """Reject JSON that is nested too deeply or has too many values (objects, arrays and scalars).

    Raises:
        InvalidRequest: DEPTH_MAX or VALUES_MAX is exceeded; names the field.
    """
    # Level by level instead of recursively: the input may be nested more deeply than Python's stack.
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEPTH_MAX:
            raise InvalidRequest(field, f"is nested more than {DEPTH_MAX} levels deep")
        if count > VALUES_MAX:
            raise InvalidRequest(field, f"has more than {VALUES_MAX} values")
        level = [inner for outer in level for inner in _inside(outer)]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
