"""How deep and how large a client's JSON may be, before anybody works on it recursively.

Pure. Knows nothing of schemas: whether one compiles, only an engine can tell. Frontends ask it first, and an engine
again, for whoever calls a worker himself.
"""

from __future__ import annotations

from typing import Any

from tandem.errors import InvalidRequest

DEPTH_MAX = 64
VALUES_MAX = 2_000


def check_json_bounds(field: str, value: Any) -> None:
    """Refuse JSON that is nested too deeply or holds too many values: objects, arrays and what is in them.

    Raises:
        InvalidRequest: names the field.
    """
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEPTH_MAX:
            raise InvalidRequest(field, f"is nested more than {DEPTH_MAX} levels deep")
        if count > VALUES_MAX:
            raise InvalidRequest(field, f"holds more than {VALUES_MAX} values")
        level = [inner for outer in level for inner in _inside(outer)]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
