"""The table of HTTP errors: status, error types of OpenAI and Anthropic, gRPC codes, and what the edge adds by itself.

The edge renders it into Envoy's configuration and into its Lua filter; the frontend uses it for errors inside a stream,
whose HTTP status has been sent already. So all three give one failure the same type.
"""

from __future__ import annotations

from dataclasses import dataclass

INVALID_REQUEST = "invalid_request_error"
SERVICE_UNAVAILABLE = "service_unavailable_error"
SERVER_ERROR = "server_error"
ANTHROPIC_API_ERROR = "api_error"
"""Anthropic's type of every failure that has no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    """One HTTP status of a failed call."""

    status: int
    type: str
    """`type` of OpenAI's error object."""
    messages_type: str = INVALID_REQUEST
    """`type` of Anthropic's error object."""
    codes: tuple[str, ...] = ()
    """gRPC codes that become this status."""
    edge_code: str | None = None
    """`code` of the error object where the edge itself refuses the call; a frontend's is ErrorInfo's reason."""
    edge_retry_after_s: int | None = None
    """`Retry-After` where the edge itself refuses the call; a frontend's is RetryInfo's delay."""


ROWS = (
    HttpError(status=400, type=INVALID_REQUEST, codes=("INVALID_ARGUMENT", "OUT_OF_RANGE")),
    HttpError(
        status=401,
        type="authentication_error",
        messages_type="authentication_error",
        codes=("UNAUTHENTICATED",),
        edge_code="invalid_api_key",
    ),
    HttpError(status=403, type="permission_error", messages_type="permission_error", codes=("PERMISSION_DENIED",)),
    HttpError(status=404, type=INVALID_REQUEST, messages_type="not_found_error", codes=("NOT_FOUND",)),
    HttpError(status=405, type=INVALID_REQUEST),
    HttpError(status=408, type="timeout_error", messages_type="timeout_error"),
    HttpError(status=409, type=INVALID_REQUEST, codes=("ALREADY_EXISTS", "ABORTED")),
    HttpError(status=413, type=INVALID_REQUEST, messages_type="request_too_large"),
    HttpError(status=422, type=INVALID_REQUEST),
    HttpError(
        status=429,
        type="rate_limit_error",
        messages_type="rate_limit_error",
        codes=("RESOURCE_EXHAUSTED",),
        edge_code="rate_limit_exceeded",
        edge_retry_after_s=1,
    ),
    HttpError(status=431, type=INVALID_REQUEST),
    HttpError(status=499, type="api_error", messages_type="api_error", codes=("CANCELLED",)),
    HttpError(status=500, type=SERVER_ERROR, messages_type="api_error", codes=("INTERNAL", "UNKNOWN", "DATA_LOSS")),
    HttpError(status=501, type=SERVER_ERROR, messages_type="api_error", codes=("UNIMPLEMENTED",)),
    HttpError(status=502, type=SERVICE_UNAVAILABLE, messages_type="overloaded_error"),
    # FAILED_PRECONDITION is about workers that do not fit together: the caller can only wait, so it is not a 400.
    HttpError(
        status=503,
        type=SERVICE_UNAVAILABLE,
        messages_type="overloaded_error",
        codes=("UNAVAILABLE", "FAILED_PRECONDITION"),
        edge_retry_after_s=1,
    ),
    HttpError(status=504, type="timeout_error", messages_type="timeout_error", codes=("DEADLINE_EXCEEDED",)),
)
ERRORS = {row.status: row for row in ROWS}
ERROR_BY_CODE = {code: row for row in ROWS for code in row.codes}
"""By the name of the gRPC code."""
TRANSCODER_OVERRIDES = ("FAILED_PRECONDITION",)
"""gRPC codes to which Envoy's transcoder gives another status than this table: the Lua filter replaces it."""
TOO_LARGE_REASON, TOO_LARGE_STATUS = "REQUEST_TOO_LARGE", 413
"""The one ErrorInfo reason with another status than its gRPC code."""
