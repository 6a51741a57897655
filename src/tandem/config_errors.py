"""Text about settings: the help of each flag and the message for each invalid value.

Owns wording only. Settings and their ranges are defined once, in the pydantic models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

ONE_OF = re.compile(r"\^\(([\w|.-]+)\)\$")
TYPES = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a JSON object",
    "path_type": "a path",
    "string_type": "text",
}


def metavar(name: str, field: FieldInfo) -> str:
    """Placeholder of a flag's value in its help."""
    kinds = {kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)}
    allowed = choices(field)
    if allowed:
        return "|".join(allowed)
    if bool in kinds:
        return "true|false"
    if int in kinds:
        return "N"
    if float in kinds:
        return "SECONDS" if name.endswith("_s") else "NUMBER"
    if Path in kinds:
        return "PATH"
    if dict in kinds or "dict" in str(field.annotation):
        return "JSON"
    return "HOST:PORT" if "host:port" in (field.description or "") else name.split("_")[-1].upper()


def explanation(field: FieldInfo) -> str:
    """Help of a flag, with its default unless the description already gives it."""
    description = field.description or ""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required():
        return f"{description}; must be given"
    return description if default is None or default == {} else f"{description} (default: {_shown(default)})"


def limits(field: FieldInfo) -> str:
    """What a value must be, in a few words; empty if its type says everything."""
    allowed, limit = choices(field), _bounds(field)
    if allowed:
        return ", ".join(allowed)
    if "max_length" in limit:
        return f"{limit.get('min_length', 0)} to {limit['max_length']} characters"
    if "min_length" in limit:
        return "not empty"
    return _range(limit).strip() or next((f"of the form {pattern}" for pattern in _patterns(field)), "")


def choices(field: FieldInfo) -> list[str]:
    """The words that a setting may be; empty if it is not limited to some."""
    found = next((ONE_OF.fullmatch(pattern) for pattern in _patterns(field)), None)
    return found[1].split("|") if found else []


def sentence(fields: Mapping[str, FieldInfo], error: ErrorDetails) -> str:
    """Error message for one setting, with the allowed values; never contains the value of another setting."""
    if error["type"] == "missing":
        return "must be given"
    field = fields.get(str(error["loc"][0])) if error["loc"] else None
    got = f", not {error['input']!r}" if isinstance(error["input"], str | int | float) else ""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    if field is None:
        return f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"must be {_allowed(field, error)}{got}"


def _allowed(field: FieldInfo, error: ErrorDetails) -> str:
    words = choices(field)
    if words:
        return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]
    bounds = _bounds(field)
    if error["type"] == "string_pattern_mismatch":
        return f"of the form {error['ctx']['pattern']}"
    if error["type"].startswith("string_too"):
        return f"{bounds.get('min_length', 0)} to {bounds['max_length']} characters long"
    allowed, kind = _range(bounds), TYPES.get(error["type"])
    if kind is None:
        # The kind is right, only the value is out of range.
        return allowed or ("a whole number" if "int" in str(field.annotation) else "a number")
    return f"{kind}, {allowed}" if allowed else kind


def _range(bounds: Mapping[str, Any]) -> str:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None and high is None:
        return ""
    if high is None:
        return f"at least {low}" if "ge" in bounds else f"above {low}"
    return f"{low} to {high}" if "ge" in bounds else f"above {low}, at most {high}"


def _bounds(field: FieldInfo) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "min_length", "max_length")
    return {name: getattr(rule, name) for rule in field.metadata for name in names if hasattr(rule, name)}


def _patterns(field: FieldInfo) -> list[str]:
    patterns = (getattr(rule, "pattern", None) for rule in field.metadata)
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
