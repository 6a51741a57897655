"""OpenAI's error object for HTTP clients: message, type, param, code.

The same mapping as in services/edge/tandem_edge/envoy/errors.lua, which rewrites statuses; a test compares the two.
Here it is for failures inside a stream.
"""

from __future__ import annotations

import logging
from typing import Any

from tandem.errors import TandemError

log = logging.getLogger(__name__)

TYPE_BY_CODE = {
    "INVALID_ARGUMENT": "invalid_request_error",
    # Incompatible workers: the client can only wait.
    "FAILED_PRECONDITION": "service_unavailable_error",
    "OUT_OF_RANGE": "invalid_request_error",
    "NOT_FOUND": "invalid_request_error",
    "ALREADY_EXISTS": "invalid_request_error",
    "UNAUTHENTICATED": "authentication_error",
    "PERMISSION_DENIED": "permission_error",
    "RESOURCE_EXHAUSTED": "rate_limit_error",
    "CANCELLED": "api_error",
    "DEADLINE_EXCEEDED": "timeout_error",
    "UNAVAILABLE": "service_unavailable_error",
    "UNIMPLEMENTED": "server_error",
    "INTERNAL": "server_error",
}


def error_body(error: TandemError) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = TYPE_BY_CODE[error.code]
    body = {
        "message": error.message,
        "type": kind,
        # For incompatible workers, `field` names what differs between them, not a field of the request.
        "param": None if kind == "service_unavailable_error" else error.metadata.get("field"),
        "code": error.reason.lower(),
    }
    return {"error": body}


def last_event(problem: Exception) -> dict[str, Any]:
    """The error object that ends a stream which has begun: HTTP/1.1 clients no longer see a status then.

    For the same reason a defect, too, must be reported here.
    """
    if isinstance(problem, TandemError):
        return error_body(problem)
    log.error("defect while streaming events; the stream ends with an internal error", exc_info=problem)
    return error_body(TandemError(f"internal error: {type(problem).__name__}"))
