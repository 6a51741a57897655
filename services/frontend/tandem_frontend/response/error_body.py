"""The OpenAI error object of a failure inside a stream: message, type, param, code.

Failures before the first byte get the same object from the edge's Lua filter; both derive it from
`tandem.domain.http_errors`.
"""

from __future__ import annotations

import logging
from typing import Any

from tandem.domain.http_errors import ERROR_BY_CODE, SERVICE_UNAVAILABLE
from tandem.errors import TandemError

log = logging.getLogger(__name__)


def error_body(error: TandemError) -> dict[str, Any]:
    """The error object, as JSON values."""
    kind = ERROR_BY_CODE[error.code].type
    body = {
        "message": error.message,
        "type": kind,
        # Of workers that do not fit together, `field` names the capability that differs, not a field of the request.
        "param": None if kind == SERVICE_UNAVAILABLE else error.metadata.get("field"),
        "code": error.reason.lower(),
    }
    return {"error": body}


def last_event(problem: Exception) -> dict[str, Any]:
    """The error object that ends a stream which has begun: its HTTP status was sent long ago.

    A defect becomes an error object too. Its text goes to the log only, because it may hold a client's data.
    """
    if isinstance(problem, TandemError):
        return error_body(problem)
    log.error("internal error in an event stream; the client gets an error object", exc_info=problem)
    return error_body(TandemError(f"internal error: {type(problem).__name__}"))
