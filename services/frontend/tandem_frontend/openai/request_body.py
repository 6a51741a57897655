"""A request's body: bytes to one of the schemas. A refusal names the parameter as the client wrote it."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError

from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import Schema

S = TypeVar("S", bound=Schema)

PLACE_CHARS_MAX = 200
FAULTS_MAX = 1_000
"""More are not looked at one by one: each becomes an object with a sentence of its own first."""
SENTENCES = {
    "missing": "must be given",
    "extra_forbidden": "is not a parameter of this API",
    "none_required": "is not supported here",
    "union_tag_not_found": "must be given",
}


def parse(schema: type[S], data: bytes) -> S:
    """The request in a body.

    Raises:
        InvalidRequest: the body is no JSON, or names the parameter at fault.
    """
    try:
        return schema.model_validate_json(data)
    except ValidationError as problem:
        raise _explained(problem, data) from None


def _explained(problem: ValidationError, data: bytes) -> InvalidRequest:
    if problem.error_count() > FAULTS_MAX:
        return InvalidRequest("body", f"has {problem.error_count()} faults")
    errors = problem.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return InvalidRequest("body", f"is not JSON: {errors[0]['ctx']['error']}")
    given = json.loads(data)
    if not isinstance(given, dict):
        return InvalidRequest("body", "must be a JSON object")
    # Where several shapes are possible, each one complains; the deepest complaint is about the shape that was meant,
    # and a complaint of anything but the type is about the right shape.
    place, error = max(
        ((_place(error, given), error) for error in errors),
        key=lambda found: (len(found[0]), not found[1]["type"].endswith("_type")),
    )
    field = re.sub(r"\.(\[)", r"\1", ".".join(place)) or "body"
    return InvalidRequest(field[:PLACE_CHARS_MAX], _sentence(error))


def _place(error: Any, given: Any) -> list[str]:
    """The way to the fault through what was sent; pydantic's own names of alternatives are left out of it."""
    place: list[str] = []
    at = given
    for step in error["loc"]:
        if isinstance(step, int) and isinstance(at, list) and step < len(at):
            at = at[step]
            place.append(f"[{step}]")
        elif isinstance(at, dict) and step in at:
            at = at[step]
            place.append(str(step))
    if error["type"] == "missing":
        place.append(str(error["loc"][-1]))
    elif error["type"].startswith("union_tag"):
        place.append(str(error["ctx"]["discriminator"]).strip("'"))
    return place


def _sentence(error: Any) -> str:
    if error["type"] in SENTENCES:
        return SENTENCES[error["type"]]
    if error["type"] == "union_tag_invalid":
        return f"must be one of {error['ctx']['expected_tags']}"
    if error["type"] == "too_short" and error["ctx"]["min_length"] == 1:
        return "must not be empty"
    message = str(error["msg"])
    return re.sub("^(Input|String|List|Value|Dictionary) should", "must", message)
