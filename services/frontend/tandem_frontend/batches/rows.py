"""Runs one row: the request goes through the same endpoint as a client's own, and becomes one line of a result file.

Owns the form of a result, and which failures are the row's own. A row that finds no capacity, no worker or no quota has
not failed: it runs again later.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from tandem.domain.http_errors import ERROR_BY_CODE, TOO_LARGE_REASON, TOO_LARGE_STATUS
from tandem.errors import (
    Draining,
    IncompatibleWorkers,
    InvalidRequest,
    NoWorkers,
    Overloaded,
    RequestError,
    TandemError,
)
from tandem_frontend.batches.input_rows import Row
from tandem_frontend.batches.records import Batch, Status
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.response import to_json
from tandem_frontend.openai.servicer import OPERATIONS
from tandem_frontend.response.error_body import error_body
from tandem_frontend.response.writers import ClientCall

log = logging.getLogger(__name__)

Answer = Callable[[str, bytes, Caller, ClientCall], Awaitable[None]]
TENANT_PREFIX = "batch:"
"""Before a tenant's name where shares are counted: rows take none of those of its live requests. No client id has a
colon."""
ATTEMPTS_MAX = 3
"""Runs of a row that fail after they found capacity. A request that breaks workers must end."""
WAIT_S = 1.0
"""Until a row runs again whose failure says nothing about when."""
NOT_RUN = {
    Status.EXPIRED: ("batch_expired", "This request was not run before the completion window ended."),
    Status.CANCELLED: ("batch_cancelled", "This request was not run because the batch was cancelled."),
}
"""Code and message of rows without a result at the end of a batch."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a row has come to."""

    text: bytes
    """One line of JSON."""
    is_error: bool


@dataclass(frozen=True, slots=True)
class Later:
    """A row must run again."""

    wait_s: float
    """Not before this time has passed."""
    has_failed: bool
    """Whether it counts as one of its attempts."""


class RowCall:
    """What the endpoint takes for a client's call: keeps the response."""

    writable = True
    """See `writers.Call`."""

    def __init__(self) -> None:
        self.data = b""

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """See `writers.Call`. Never called, because it is always writable."""

    def send(self, message: HttpBody) -> None:
        """See `writers.Call`."""
        self.data += message.data

    def set_initial_metadata(self, head: Callable[[], Sequence[tuple[str, str]]]) -> None:
        """See `writers.ClientCall`. A row has no headers."""


async def run_row(answer: Answer, batch: Batch, row: Row, attempt: int) -> Result | Later:
    """Run a row of a batch; `attempt` counts from 1. Cancelling this aborts it in the engines."""
    request_id = _id("batch_req_", batch, row.number)
    caller = Caller(
        tenant=batch.tenant,
        fairness_id=TENANT_PREFIX + batch.tenant,
        quota=batch.quota,
        operation=OPERATIONS[batch.endpoint],
        call_id=request_id,
        is_background=True,
    )
    call = RowCall()
    try:
        if row.is_streamed:
            raise InvalidRequest("stream", "must be false in a batch")
        await answer(batch.endpoint, row.body, caller, call)
    except asyncio.CancelledError:
        raise
    except TandemError as problem:
        return _failed(batch, row, problem, attempt)
    except Exception:
        # A broad except is right here: a defect must cost its row, not the batch.
        log.exception("row %d of %s met a defect", row.number, batch.id)
        return _failed(batch, row, TandemError("internal error"), attempt)
    return Result(_line(batch, row, 200, call.data), is_error=False)


def not_run(batch: Batch, number: int, custom_id: str, ending: Status) -> bytes:
    """The result of a row that the end of its batch has left without one."""
    code, message = NOT_RUN[ending]
    error = {"code": code, "message": message}
    result = {"id": _id("batch_req_", batch, number), "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(result, separators=(",", ":")).encode()


def _failed(batch: Batch, row: Row, problem: TandemError, attempt: int) -> Result | Later:
    if isinstance(problem, Overloaded | Draining | NoWorkers | IncompatibleWorkers):
        return Later(problem.retry_delay_s or WAIT_S, has_failed=False)
    if not isinstance(problem, RequestError) and attempt < ATTEMPTS_MAX:
        return Later(problem.retry_delay_s or WAIT_S, has_failed=True)
    status = TOO_LARGE_STATUS if problem.reason == TOO_LARGE_REASON else ERROR_BY_CODE[problem.code].status
    return Result(_line(batch, row, status, to_json(error_body(problem))), is_error=True)


def _line(batch: Batch, row: Row, status: int, body: bytes) -> bytes:
    """A result with a response, whose JSON is put in as it is."""
    head = {"id": _id("batch_req_", batch, row.number), "custom_id": row.custom_id}
    response: dict[str, Any] = {"status_code": status, "request_id": head["id"]}
    begin = json.dumps({**head, "response": response}, separators=(",", ":"))
    return begin.removesuffix("}}").encode() + b',"body":' + body + b'},"error":null}'


def _id(prefix: str, batch: Batch, number: int) -> str:
    """The same for each run of a row."""
    return prefix + hashlib.sha256(f"{batch.id}:{number}".encode()).hexdigest()[:32]
