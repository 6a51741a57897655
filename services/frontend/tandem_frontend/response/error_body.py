"""The error object of everything Tandem says over HTTP: message, type, param, code.

The same mapping as in services/edge/tandem_edge/envoy/errors.lua, which rewrites statuses; a test holds the two
together. Here it is for failures inside a stream.
"""

from __future__ import annotations

import logging
from typing import Any

from tandem.errors import TandemError

log = logging.getLogger(__name__)

TYPE_BY_CODE = {
    "INVALID_ARGUMENT": "invalid_request_error",
    # Ours are about workers that do not fit: the caller can only wait.
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
    """The JSON object that tells a failure."""
    kind = TYPE_BY_CODE[error.code]
    told = {
        "message": error.message,
        "type": kind,
        # Of workers that do not fit, `field` names what differs between them, not a field of the request.
        "param": None if kind == "service_unavailable_error" else error.metadata.get("field"),
        "code": error.reason.lower(),
    }
    return {"error": told}


def last_event(problem: Exception) -> dict[str, Any]:
    """The error object with which a stream ends that has begun: over HTTP/1.1 nobody sees a status any more.

    A defect too must be told here, for the same reason.
    """
    if isinstance(problem, TandemError):
        return error_body(problem)
    log.error("defect behind a stream of events", exc_info=problem)
    return error_body(TandemError(f"internal error: {type(problem).__name__}"))
