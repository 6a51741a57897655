"""Every error of the library through Envoy: status, form, delay; and messages that try to break the form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from google.api.httpbody_pb2 import HttpBody
from tandem_frontend.response.error_body import error_body

from tandem import errors
from tandem.errors import TandemError
from tests.integration.support.edge_host import StubFrontend, client_of, detokenize, edge, error_of, stub_frontend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

Host = tuple[StubFrontend, httpx.AsyncClient]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with (
        stub_frontend() as (stub, address),
        edge(tmp_path_factory.mktemp("edge"), address) as process,
        client_of(process) as client,
    ):
        yield stub, client
        assert "script log" not in process.log.read_text(), "the filter itself has failed"


class Forbidden(TandemError):
    code = "PERMISSION_DENIED"
    reason = "FORBIDDEN"


class Unauthenticated(TandemError):
    code = "UNAUTHENTICATED"
    reason = "WHO"


ERRORS: list[tuple[TandemError, int, str, str | None, str | None]] = [
    (errors.InvalidRequest("a.b[0]", "is bad"), 400, "invalid_request_error", "a.b[0]", None),
    (errors.ModelNotFound("no", model="m"), 404, "invalid_request_error", None, None),
    (errors.DuplicateWorker("twice", field="address"), 409, "invalid_request_error", "address", None),
    (errors.NotSupported("cannot", field="guided"), 501, "server_error", "guided", None),
    (errors.NoWorkers("none", role="decode"), 503, "service_unavailable_error", None, "1"),
    (errors.IncompatibleWorkers("differ", field="kv_dtype"), 503, "service_unavailable_error", None, None),
    (errors.LegFailed("broke", leg="decode"), 503, "service_unavailable_error", None, None),
    (errors.Draining("going"), 503, "service_unavailable_error", None, "1"),
    (errors.Overloaded("full", retry_delay_s=1.5), 429, "rate_limit_error", None, "2"),
    (errors.Overloaded("full", retry_delay_s=60), 429, "rate_limit_error", None, "60"),
    (errors.DeadlinePassed("late"), 504, "timeout_error", None, None),
    (errors.RequestAborted("ended"), 499, "api_error", None, None),
    (errors.EngineFailed("died"), 500, "server_error", None, None),
    (TandemError("defect"), 500, "server_error", None, None),
    (Forbidden("no"), 403, "permission_error", None, None),
    (Unauthenticated("who"), 401, "authentication_error", None, None),
]


@pytest.mark.parametrize(
    ("failure", "status", "kind", "param", "retry_after"), ERRORS, ids=[type(row[0]).__name__ for row in ERRORS]
)
async def test_status_type_param_code_and_delay(
    host: Host, failure: TandemError, status: int, kind: str, param: str | None, retry_after: str | None
) -> None:
    stub, client = host
    stub.failure = failure
    response = await detokenize(client)
    assert response.status_code == status, response.text
    expected = {"message": failure.message, "type": kind, "param": param, "code": failure.reason.lower()}
    assert error_of(response) == expected
    assert error_body(failure) == {"error": expected}, "an error inside a stream has the same object"
    assert response.headers.get("retry-after") == retry_after


MESSAGES = [
    '","code":"fooled","param":"fooled"}}',
    '{"error":{"message":"fooled"}}',
    '"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","domain":"tandem","reason":"FOOLED"}]',
    '"field":"fooled" \\" \\\\" \\\\\\',
    "two\nlines\tand \x01 control, 東京 🙂, </script>, %s %d",
    "x" * 800,
]


@pytest.mark.parametrize("message", MESSAGES)
async def test_a_message_cannot_break_the_form(host: Host, message: str) -> None:
    stub, client = host
    stub.failure = errors.InvalidRequest('p"}],"q', message, other=message, reason="FOOLED", domain="x")
    error = error_of(await detokenize(client))
    assert error == {
        "message": f'p"}}],"q: {message}',
        "type": "invalid_request_error",
        "param": 'p"}],"q',
        "code": "invalid_request",
    }


async def test_a_defect_is_reported_without_its_message(host: Host) -> None:
    stub, client = host
    stub.failure = KeyError("secret")
    response = await detokenize(client)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal"


async def test_an_error_too_long_for_headers_is_cut_and_harms_no_other_stream(host: Host) -> None:
    stub, client = host
    stub.failure = errors.InvalidRequest("prompt", "é" * 100_000)
    refused = asyncio.Event()

    async def slow() -> AsyncIterator[HttpBody]:
        yield HttpBody(content_type="text/event-stream", data=b"data: 1\n\n")
        await refused.wait()
        yield HttpBody(data=b"data: 2\n\n")

    stub.stream = slow
    async with client.stream("POST", "/v1/generate", json={"prompt": "x"}) as stream:
        chunks = stream.aiter_text()
        assert await anext(chunks) == "data: 1\n\n"
        response = await detokenize(client)
        refused.set()
        assert await anext(chunks) == "data: 2\n\n"
    assert response.status_code == 400
    error = error_of(response)
    assert error["message"].startswith("prompt: ééé")
    assert error["message"].endswith("é...")
    assert (error["param"], error["code"]) == ("prompt", "invalid_request")


async def test_a_successful_response_is_unchanged(host: Host) -> None:
    stub, client = host
    stub.failure = None
    stub.text = json.dumps({"error": {"message": "not one"}})
    response = await detokenize(client)
    assert (response.status_code, response.json()) == (200, {"text": stub.text})


async def test_a_large_answer_is_not_cut(host: Host) -> None:
    stub, client = host
    stub.failure = None
    stub.text = "x" * 12_000_000
    response = await detokenize(client)
    assert (response.status_code, response.json()) == (200, {"text": stub.text})


async def test_an_edge_without_a_frontend_is_unavailable(tmp_path: Any) -> None:
    async with edge(tmp_path, "127.0.0.1:1") as process, client_of(process) as client:
        response = await detokenize(client)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["type"] == "service_unavailable_error"
        assert (await client.get("/healthz")).status_code == 503


async def test_a_silent_frontend_is_504(tmp_path: Any) -> None:
    async def silent() -> AsyncIterator[Any]:
        await asyncio.sleep(30)
        yield None

    async with (
        stub_frontend() as (stub, address),
        edge(tmp_path, address, stream_idle_timeout_s=0.5) as process,
        client_of(process) as client,
    ):
        stub.stream = silent
        response = await client.post("/v1/generate", json={"prompt": "x"})
        assert response.status_code == 504
        assert error_of(response)["type"] == "timeout_error"


async def test_a_failure_that_comes_after_the_headers_has_the_same_form(host: Host) -> None:
    stub, client = host
    stub.failure, stub.headers_first, stub.delay_s = errors.ModelNotFound("no", model="m"), True, 0.1
    try:
        error = error_of(await detokenize(client))
    finally:
        stub.failure, stub.headers_first, stub.delay_s = None, False, 0.0
    assert (error["message"], error["code"]) == ("no", "model_not_found")
