"""Anthropic's form at the edge: keys as its SDKs send them, and every refusal in its words. A real Envoy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from google.api.httpbody_pb2 import HttpBody
from tandem_edge.transcoding import HEALTH_SERVICE_NAME

from tandem.api.frontend.v1 import anthropic_service_pb2_grpc as pb_grpc
from tandem.api.frontend.v1 import inference_service_pb2_grpc as inference_grpc
from tandem.errors import (
    DeadlinePassed,
    InvalidRequest,
    ModelNotFound,
    NotSupported,
    NoWorkers,
    Overloaded,
    RequestTooLarge,
    TandemError,
)
from tandem.local_cluster.child_process import ClusterProcess
from tandem.rpc.server import RpcServer
from tests.integration.support.edge_host import StubFrontend, client_of, edge

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

KEY = "sk-alice-0123456789abcdef"
AUTH = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
BODY_BYTES_MAX = 4096


class StubMessages(pb_grpc.AnthropicServiceServicer):
    """Fails as the test says; otherwise returns what it was called with."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.seen: dict[str, Any] = {}

    async def Messages(self, request: HttpBody, context: Any) -> AsyncIterator[HttpBody]:  # noqa: N802
        self.seen = dict(context.invocation_metadata())
        if self.failure is not None:
            raise self.failure
        yield HttpBody(content_type="application/json", data=request.data)

    async def CountTokens(self, request: HttpBody, context: Any) -> HttpBody:  # noqa: N802
        if self.failure is not None:
            raise self.failure
        return HttpBody(content_type="application/json", data=b'{"input_tokens":1}')


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stub() -> AsyncIterator[tuple[StubMessages, str]]:
    messages = StubMessages()
    inference = StubFrontend()  # type: ignore[abstract] # only its health is asked for
    server = RpcServer(
        [
            (HEALTH_SERVICE_NAME, partial(inference_grpc.add_InferenceServiceServicer_to_server, inference)),
            ("messages", partial(pb_grpc.add_AnthropicServiceServicer_to_server, messages)),
        ]
    )
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    yield messages, f"127.0.0.1:{server.port}"
    await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def process(
    stub: tuple[StubMessages, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterProcess]:
    logs = tmp_path_factory.mktemp("edge")
    keys = logs / "keys"
    keys.write_text(f"alice: {KEY}\n")
    keys.chmod(0o600)
    limits = {"body_bytes_max": BODY_BYTES_MAX, "cors_origins": "https://app.example"}
    async with edge(logs, stub[1], api_keys=keys, **limits) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def client(process: ClusterProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(process, headers=AUTH) as one:
        yield one


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, type and message; there is nothing else in the body. Anthropic's SDKs find the request's id."""
    assert response.headers.get_list("request-id") == [response.headers["x-request-id"]]
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert (set(body), body["type"], set(body["error"])) == ({"type", "error"}, "error", {"type", "message"}), body
    return response.status_code, body["error"]["type"], body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true"])
async def test_a_key_in_anthropics_header_is_a_key(
    stub: tuple[StubMessages, str], client: httpx.AsyncClient, path: str
) -> None:
    stub[0].failure = None
    found = await client.post(path, json={"a": 1})
    assert (found.status_code, found.json()) == (200, {"a": 1})
    assert stub[0].seen["x-client-id"] == "alice"
    assert KEY not in str(stub[0].seen), "a key goes no further than the edge"
    assert found.headers["request-id"] == found.headers["x-request-id"]


async def test_a_key_in_openais_header_is_one_too(stub: tuple[StubMessages, str], process: ClusterProcess) -> None:
    stub[0].failure = None
    async with client_of(process, headers={"authorization": f"Bearer {KEY}"}) as one:
        assert (await one.post("/v1/messages/count_tokens", json={})).json() == {"input_tokens": 1}


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "sk-unknown-0123456789"}, {"authorization": "Bearer nope"}])
async def test_without_a_known_key(process: ClusterProcess, headers: dict[str, str]) -> None:
    async with client_of(process, headers=headers) as one:
        found = await one.post("/v1/messages", json={})
        assert error_of(found)[:2] == (401, "authentication_error")
        other = await one.post("/v1/chat/completions", json={})
        assert set(other.json()["error"]) == {"message", "type", "param", "code"}, "OpenAI's door keeps its own form"


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (InvalidRequest("temperature", "must be 0 to 2, not 9"), 400, "invalid_request_error"),
        (ModelNotFound("model 'x' not found", model="x"), 404, "not_found_error"),
        (RequestTooLarge("messages", "is too long"), 413, "request_too_large"),
        (Overloaded("too many open requests", limit="open_requests", retry_delay_s=3), 429, "rate_limit_error"),
        (TandemError("internal error"), 500, "api_error"),
        (NotSupported("no grammar"), 501, "api_error"),
        (NoWorkers("no worker"), 503, "overloaded_error"),
        (DeadlinePassed("the deadline passed"), 504, "timeout_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_failures_of_a_frontend(
    stub: tuple[StubMessages, str], client: httpx.AsyncClient, failure: TandemError, status: int, kind: str, path: str
) -> None:
    stub[0].failure = failure
    found = await client.post(path, json={})
    assert error_of(found) == (status, kind, failure.message)
    assert found.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)


async def test_refusals_of_the_edge(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v1/messages"))[:2] == (405, "invalid_request_error")
    assert error_of(await client.post("/v1/messages/batches", json={}))[:2] == (404, "not_found_error")
    text = await client.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"})
    assert error_of(text)[:2] == (415, "invalid_request_error")
    large = await client.post("/v1/messages", json={"a": "x" * BODY_BYTES_MAX})
    assert error_of(large)[:2] == (413, "request_too_large")


async def test_a_browser_may_send_anthropics_headers(client: httpx.AsyncClient) -> None:
    asked = "x-api-key,anthropic-version,anthropic-beta,anthropic-dangerous-direct-browser-access,content-type"
    found = await client.options(
        "/v1/messages",
        headers={
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": asked,
        },
    )
    assert found.status_code == 200
    allowed = {name.strip() for name in found.headers["access-control-allow-headers"].split(",")}
    assert set(asked.split(",")) <= allowed


async def test_without_a_frontend(tmp_path: Path) -> None:
    async with edge(tmp_path, "127.0.0.1:1") as started, client_of(started) as one:
        assert error_of(await one.post("/v1/messages", json={}))[:2] == (503, "overloaded_error")
