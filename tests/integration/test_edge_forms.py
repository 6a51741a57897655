"""The forms in which clients, SDKs, proxies and load balancers send a request: each reaches what it means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from google.api.httpbody_pb2 import HttpBody

import tandem
from tandem.local_cluster.child_process import ClusterProcess
from tests.integration.support.edge_host import JSON, StubFrontend, client_of, edge, error_of, stub_frontend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

KEY = "sk-alice-0123456789"
ORIGIN = "https://chat.example"
BODY = b'{"token_ids":[1]}'
PAGE = {"origin": ORIGIN}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stub() -> AsyncIterator[tuple[StubFrontend, str]]:
    async with stub_frontend() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def open_edge(
    stub: tuple[StubFrontend, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterProcess]:
    async with edge(tmp_path_factory.mktemp("edge"), stub[1], cors_origins=ORIGIN) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(open_edge: ClusterProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(open_edge) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keyed(
    stub: tuple[StubFrontend, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    directory = tmp_path_factory.mktemp("edge")
    (directory / "keys").write_text(f"alice: {KEY}\n")
    flags = {"api_keys": directory / "keys", "cors_origins": "*"}
    async with edge(directory, stub[1], **flags) as process, client_of(process) as opened:
        yield opened


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/healthz", "/health", "/health/", "/ping", "/ready", "/readyz", "/v1/health?a=1"])
async def test_health_has_many_names(
    client: httpx.AsyncClient, keyed: httpx.AsyncClient, method: str, path: str
) -> None:
    for asked in (client, keyed):
        response = await asked.request(method, path, headers=PAGE)
        assert response.status_code == 200
        assert method == "HEAD" or response.json() == {"status": "serving"}
        assert "access-control-allow-origin" in response.headers


async def test_the_version_is_for_clients_that_may_call(client: httpx.AsyncClient, keyed: httpx.AsyncClient) -> None:
    for path in ("/version", "/version/", "/version?verbose=1"):
        assert (await client.get(path)).json() == {"version": tandem.__version__}
    assert (await client.post("/version")).headers["allow"] == "GET"
    assert (await keyed.get("/version")).status_code == 401


async def test_metrics_are_refused_with_the_place_where_they_are(client: httpx.AsyncClient) -> None:
    for path in ("/metrics", "/metrics/"):
        found = await client.get(path)
        assert found.status_code == 404
        assert "metrics_port" in found.json()["error"]["message"]


# The stub has no OpenAI service: a call that reaches it gets 501 instead of 200.
REACHED = 501


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models?limit=20&after=x"),
        ("GET", "/v1/models/"),
        ("GET", "/models"),
        ("GET", "/v1/models/org/name?api-version=2024-10-21"),
        ("HEAD", "/v1/models"),
        ("POST", "/v1/chat/completions?api-version=2024-10-21"),
        ("POST", "/v1/chat/completions?beta=true&data=%7B%7D&content_type=x"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/chat/completions//?"),
        ("POST", "/chat/completions"),
        ("POST", "/completions/"),
    ],
)
async def test_spellings_of_openai_paths_reach_a_frontend(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path, headers=JSON, content=b"{}" if method == "POST" else None)
    assert response.status_code == REACHED, response.text


@pytest.mark.parametrize("path", ["/v1/detokenize", "/v1/detokenize/", "/v1//detokenize"])
async def test_spellings_of_typed_paths(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path, headers=JSON, content=BODY)).status_code == 200
    refused = await client.post(f"{path}?tokens=1", headers=JSON, content=BODY)
    assert refused.status_code == 400, "a parameter of the typed API is not ignored"


async def test_head_is_get_without_the_body(open_edge: ClusterProcess, client: httpx.AsyncClient) -> None:
    got = await client.get("/v1/tandem/models/a")
    asked = await client.head("/v1/tandem/models/a")
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    # On the same connection: a byte of a body would be read as the beginning of the next response.
    head, get = b"HEAD /v1/tandem/models/a HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n"
    answer = await exchanged(open_edge, head + get + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.split(b"\r\n\r\n")[1].startswith(b"HTTP/1.1 200 OK")
    for path, status in (
        ("/v1/detokenize", 405),
        ("/nowhere", 404),
        ("/v1/models", REACHED),
        ("/v1/tandem/models/a", 200),
    ):
        refused = await client.head(path)
        assert (refused.status_code, refused.content) == (status, b"")


async def exchanged(process: ClusterProcess, sent: bytes) -> bytes:
    host, port = process.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("host", ["Host: backend\r\n", "Host: 127.0.0.1\r\n", ""])
async def test_http_1_0(open_edge: ClusterProcess, host: str) -> None:
    head = (
        f"POST /v1/detokenize HTTP/1.0\r\n{host}Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    answer = await exchanged(open_edge, head.encode() + BODY)
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert b"connection: close" in answer
    assert (await exchanged(open_edge, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 OK")


@pytest.mark.parametrize(
    ("host", "status"), [("backend", 200), ("backend:8080", 200), ("evil.example", 403), ("a.b:80", 403), ("", 403)]
)
async def test_a_host_without_a_dot_is_no_page_of_the_web(client: httpx.AsyncClient, host: str, status: int) -> None:
    response = await client.post("/v1/detokenize", headers={**JSON, "host": host}, content=BODY)
    assert response.status_code == status


async def test_named_hosts_are_the_only_ones(stub: tuple[StubFrontend, str], open_edge: ClusterProcess) -> None:
    async with edge(open_edge.log.parent, stub[1], host_names="chat.example") as process, client_of(process) as client:
        for host, status in (("chat.example", 200), ("CHAT.example:80", 200), ("backend", 403), ("chatXexample", 403)):
            response = await client.post("/v1/detokenize", headers={**JSON, "host": host}, content=BODY)
            assert response.status_code == status, host


@pytest.mark.parametrize("given", ["mine-1", "11111111-1111-4111-8111-111111111111", "a b, c"])
async def test_a_request_id_is_kept_and_given_back(
    stub: tuple[StubFrontend, str], client: httpx.AsyncClient, given: str
) -> None:
    response = await client.post("/v1/detokenize", headers={**JSON, "x-request-id": given}, content=BODY)
    assert response.headers["x-request-id"] == given
    assert stub[0].seen[-1]["x-request-id"] == given
    response = await client.post("/v1/detokenize", headers={**JSON, "x-request-start": "t=1"}, content=BODY)
    assert float(stub[0].seen[-1]["x-request-start"].removeprefix("t=")) > 1e9, "the edge's own time, not the client's"
    for path in ("/nowhere", "/health", "/version"):
        refused = await client.get(path, headers={"x-request-id": "mine-2"})
        assert refused.headers["x-request-id"] == "mine-2"
    assert (await client.get("/nowhere")).headers["x-request-id"]


async def test_a_header_with_an_underscore_is_dropped(
    stub: tuple[StubFrontend, str], client: httpx.AsyncClient
) -> None:
    response = await client.post("/v1/detokenize", headers={**JSON, "x_client_id": "root"}, content=BODY)
    assert response.status_code == 200
    assert "x_client_id" not in stub[0].seen[-1]


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  ", "Bearer \t", ""])
async def test_the_scheme_of_a_key_has_no_case(
    stub: tuple[StubFrontend, str], keyed: httpx.AsyncClient, scheme: str
) -> None:
    response = await keyed.post("/v1/detokenize", headers={**JSON, "authorization": scheme + KEY}, content=BODY)
    assert response.status_code == 200
    assert stub[0].seen[-1]["x-client-id"] == "alice"
    assert "authorization" not in stub[0].seen[-1]
    for wrong in (f"Basic {KEY}", f"bearer{KEY}", f"bearer {KEY} x", "bearer"):
        refused = await keyed.post("/v1/detokenize", headers={**JSON, "authorization": wrong}, content=BODY)
        assert refused.status_code == 401, wrong


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", "/v1/detokenize", JSON, BODY, 200),
        ("POST", "/v1/detokenize", JSON, b"{", 400),
        ("POST", "/v1/detokenize", {**JSON, "host": "evil.example"}, BODY, 403),
        ("GET", "/nowhere", {}, b"", 404),
        ("DELETE", "/v1/detokenize", {}, b"", 405),
        ("POST", "/v1/detokenize", JSON, b" " * 9_000_000, 413),
        ("POST", "/v1/detokenize", {"content-type": "text/plain"}, BODY, 415),
        ("POST", "/v1/chat/completions", JSON, b"{}", 501),
    ],
)
async def test_a_page_can_read_every_status(
    client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    response = await client.request(method, path, headers={**PAGE, **headers}, content=body)
    assert response.status_code == status, response.text
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert status == 200 or error_of(response)
    stranger = await client.request(method, path, headers={"origin": "https://evil", **headers}, content=body)
    assert "access-control-allow-origin" not in stranger.headers


async def test_a_page_can_read_that_its_key_is_wrong(keyed: httpx.AsyncClient) -> None:
    refused = await keyed.post("/v1/detokenize", headers={**JSON, **PAGE}, content=BODY)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN


async def test_a_preflight_of_an_sdk(client: httpx.AsyncClient) -> None:
    names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout,x-my-own"
    asked = {**PAGE, "access-control-request-method": "POST", "access-control-request-headers": names}
    for path in ("/v1/chat/completions", "/v1/models/", "/health"):
        response = await client.options(path, headers=asked)
        assert response.status_code == 200
        allowed = {name.strip() for name in response.headers["access-control-allow-headers"].split(",")}
        # A wildcard does not cover authorization; browsers that know none need each name.
        assert {*names.split(",")} - {"x-my-own"} <= allowed
        assert "*" in allowed


def posted(path: str, version: str, body: bytes = BODY) -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def test_http_1_0_gets_a_stream_as_it_comes(stub: tuple[StubFrontend, str], open_edge: ClusterProcess) -> None:
    """Without chunks, which HTTP/1.0 has not: the end of the connection is the end of the stream."""
    is_read = asyncio.Event()

    async def events() -> AsyncIterator[HttpBody]:
        yield HttpBody(content_type="text/event-stream", data=b"data: 1\n\n")
        await is_read.wait()
        yield HttpBody(content_type="text/event-stream", data=b"data: 2\n\n")

    stub[0].stream = events
    host, port = open_edge.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(posted("/v1/generate", "1.0", b"{}"))
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readuntil(b"\n\n") == b"data: 1\n\n", "before the second event exists"
        is_read.set()
        assert await reader.read() == b"data: 2\n\n"
    writer.close()
    assert head.startswith(b"HTTP/1.0 200 OK")
    assert b"transfer-encoding" not in head


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_closes_its_side_has_left(
    stub: tuple[StubFrontend, str], open_edge: ClusterProcess, version: str
) -> None:
    """A half-closed connection looks as one that was closed: the request is aborted, so that engines are freed."""
    host, port = open_edge.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stub[0].delay_s = 0.5
    try:
        writer.write(posted("/v1/detokenize", version))
        writer.write_eof()
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
    finally:
        stub[0].delay_s = 0.0
        writer.close()


async def test_a_client_that_closes_its_side_during_a_stream_gets_no_more_of_it(
    stub: tuple[StubFrontend, str], open_edge: ClusterProcess
) -> None:
    has_ended = asyncio.Event()

    async def events() -> AsyncIterator[HttpBody]:
        try:
            yield HttpBody(content_type="text/event-stream", data=b"data: 1\n\n")
            await asyncio.Event().wait()
        finally:
            has_ended.set()

    stub[0].stream = events
    host, port = open_edge.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(posted("/v1/generate", "1.0", b"{}"))
    async with asyncio.timeout(20):
        await reader.readuntil(b"data: 1\n\n")
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await has_ended.wait()
    writer.close()
