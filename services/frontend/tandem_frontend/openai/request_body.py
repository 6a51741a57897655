"""Parses a request body into one of the schemas. An error names the parameter as the client wrote it."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError

from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import Schema

S = TypeVar("S", bound=Schema)

FIELD_CHARS_MAX = 200
ERRORS_MAX = 1_000
"""Beyond this many, no validation error is examined: pydantic builds an object and a message for each of them."""
MESSAGES = {
    "missing": "must be given",
    "extra_forbidden": "is not a parameter of this API",
    "none_required": "is not supported here",
    "union_tag_not_found": "must be given",
}
LIMITS = {
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "string_too_short": ("min_length", "must be at least {} characters long"),
    "string_too_long": ("max_length", "must be at most {} characters long"),
}
"""Per type of error, the limit that it names and the sentence, worded as every other range."""


def parse(schema: type[S], data: bytes) -> S:
    """Parse a request body.

    Raises:
        InvalidRequest: the body is not JSON, or a parameter is invalid; its `field` names which.
    """
    try:
        return schema.model_validate_json(data)
    except ValidationError as problem:
        raise _invalid_request(problem, data) from None


def _invalid_request(problem: ValidationError, data: bytes) -> InvalidRequest:
    if problem.error_count() > ERRORS_MAX:
        return InvalidRequest("body", f"has {problem.error_count()} errors")
    errors = problem.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return InvalidRequest("body", f"is not JSON: {errors[0]['ctx']['error']}")
    # Parsed again, because pydantic's error locations mix the client's keys with names of its own.
    given = json.loads(data)
    if not isinstance(given, dict):
        return InvalidRequest("body", "must be a JSON object")
    # pydantic reports errors for every alternative of a union. The deepest error belongs to the alternative that the
    # client meant, and at the same depth an error other than a wrong type does.
    path, error = max(
        ((_path(error, given), error) for error in errors),
        key=lambda found: (len(found[0]), not found[1]["type"].endswith("_type")),
    )
    field = re.sub(r"\.(\[)", r"\1", ".".join(path)) or "body"
    return InvalidRequest(field[:FIELD_CHARS_MAX], _message(error))


def _path(error: Any, given: Any) -> list[str]:
    """The path to the error in the client's JSON, without the names that pydantic adds for alternatives of a union."""
    path: list[str] = []
    at = given
    for step in error["loc"]:
        if isinstance(step, int) and isinstance(at, list) and step < len(at):
            at = at[step]
            path.append(f"[{step}]")
        elif isinstance(at, dict) and step in at:
            at = at[step]
            path.append(str(step))
    if error["type"] == "missing":
        path.append(str(error["loc"][-1]))
    elif error["type"].startswith("union_tag"):
        path.append(str(error["ctx"]["discriminator"]).strip("'"))
    return path


def _message(error: Any) -> str:
    if error["type"] in MESSAGES:
        return MESSAGES[error["type"]]
    if error["type"] == "union_tag_invalid":
        return f"must be one of {error['ctx']['expected_tags']}"
    if error["type"] == "too_short" and error["ctx"]["min_length"] == 1:
        return "must not be empty"
    limit = LIMITS.get(error["type"])
    if limit is not None:
        name, sentence = limit
        return sentence.format(error["ctx"][name])
    message = str(error["msg"])
    return re.sub("^(Input|String|List|Value|Dictionary) should", "must", message)
