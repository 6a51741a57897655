"""Anthropic's error object of a failure inside a stream. Failures before it get the same one from the edge."""

from __future__ import annotations

from typing import Any

from tandem.domain.http_errors import ERROR_BY_CODE
from tandem.errors import TandemError
from tandem_frontend.response.error_body import last_event


def error_event(problem: Exception) -> dict[str, Any]:
    """The last event of a stream that has begun. The text of a defect goes to the log only."""
    code = problem.code if isinstance(problem, TandemError) else TandemError.code
    kind = ERROR_BY_CODE[code].messages_type
    return {"type": "error", "error": {"type": kind, "message": last_event(problem)["error"]["message"]}}
