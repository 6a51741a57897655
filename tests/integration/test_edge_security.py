"""What the edge keeps out, and what it keeps to itself: keys, rates, TLS, headers, bounds, CORS, refusals to start."""

from __future__ import annotations

import asyncio
import json
import ssl
import stat
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import hpack
import httpx
import pytest
import pytest_asyncio
from cryptography import x509
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tandem_edge.transcoding import HEALTH_SERVICE_NAME

from tandem.api.frontend.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.local_cluster.child_process import ClusterProcess
from tandem.testing.eventually import assert_eventually
from tests.integration.support.attacks import PREFACE
from tests.integration.support.certificates import Authority
from tests.integration.support.edge_host import (
    StubFrontend,
    admin_of,
    client_of,
    detokenize,
    edge,
    error_of,
    exchange,
    stub_frontend,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

ALICE, BOB = "sk-alice-0123456789", "sk-bob-9876543210:with-colon"
KEYS = f"# who may call\nalice: {ALICE}\n\nbob:{BOB}\nbob: {BOB}-next\n"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stub() -> AsyncIterator[tuple[StubFrontend, str]]:
    async with stub_frontend() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def open_edge(
    stub: tuple[StubFrontend, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterProcess]:
    """Without keys, with tight bounds."""
    bounds = {"body_bytes_max": 4096, "request_timeout_s": 0.5, "headers_timeout_s": 0.5, "header_count_max": 20}
    async with edge(tmp_path_factory.mktemp("edge"), stub[1], headers_kib_max=4, **bounds) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keyed_edge(
    stub: tuple[StubFrontend, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterProcess]:
    directory = tmp_path_factory.mktemp("edge")
    (directory / "keys").write_text(KEYS)
    async with edge(directory, stub[1], api_keys=directory / "keys", log_level="debug") as process:
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer(ALICE + "x"), {"authorization": "Basic YTpi"}])
async def test_without_a_valid_key_401(
    stub: tuple[StubFrontend, str], keyed_edge: ClusterProcess, headers: dict[str, str]
) -> None:
    before = len(stub[0].seen)
    async with client_of(keyed_edge) as client:
        response = await detokenize(client, **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert len(stub[0].seen) == before


@pytest.mark.parametrize(("key", "client_id"), [(ALICE, "alice"), (BOB, "bob"), (f"{BOB}-next", "bob")])
async def test_the_frontend_learns_the_client_and_never_the_key(
    stub: tuple[StubFrontend, str], keyed_edge: ClusterProcess, key: str, client_id: str
) -> None:
    async with client_of(keyed_edge) as client:
        response = await detokenize(client, **bearer(key), **{"x-client-id": "root"})
    assert response.status_code == 200, response.text
    seen = stub[0].seen[-1]
    assert seen["x-client-id"] == client_id
    assert "authorization" not in seen
    assert key not in json.dumps({k: str(v) for k, v in seen.items()})


async def test_keys_are_in_one_private_file_only(keyed_edge: ClusterProcess) -> None:
    async with client_of(keyed_edge) as client:
        assert (await detokenize(client, **bearer(ALICE))).status_code == 200
        await detokenize(client, **bearer(ALICE + "-mistyped"))
    admin, directory = admin_of(keyed_edge)
    dump = (await admin._request("GET", "/config_dump")).decode()
    log = await assert_eventually(keyed_edge.log.read_text, lambda text: '"client":"alice"' in text, what="a flush")
    for secret in (ALICE, BOB):
        assert secret not in dump
        assert secret not in log
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    assert [file.name for file in directory.iterdir() if ALICE.encode() in _content(file)] == ["api_keys.json"]


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


async def test_health_needs_no_key(keyed_edge: ClusterProcess) -> None:
    async with client_of(keyed_edge) as client:
        assert (await client.get("/healthz")).status_code == 200


async def test_a_revoked_key_is_refused_without_a_restart(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    file.chmod(0o644)
    async with edge(tmp_path, stub[1], api_keys=file) as process, client_of(process) as client:

        async def status(key: str) -> int:
            return (await detokenize(client, **bearer(key))).status_code

        assert "every user of this machine can read the API keys" in process.log.read_text()
        assert [await status(ALICE), await status(BOB)] == [200, 200]
        # Over the connection that is open already; in place, by rename, and what cannot be read.
        file.write_text(f"bob: {BOB}\n")
        await assert_eventually(lambda: status(ALICE), lambda code: code == 401, within_s=5, what="a refusal")
        assert await status(BOB) == 200
        renamed = tmp_path / "next"
        renamed.write_text(f"alice: {ALICE}\n")
        renamed.replace(file)
        await assert_eventually(lambda: status(BOB), lambda code: code == 401, within_s=5, what="a refusal")
        assert await status(ALICE) == 200
        file.write_text("nothing of use\n")
        await assert_eventually(
            process.log.read_text, lambda text: "the previous API keys stay in force" in text, what="a log line"
        )
        assert await status(ALICE) == 200
        assert ALICE not in process.log.read_text()


async def test_each_client_has_its_own_rate(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    flags = {"api_keys": tmp_path / "keys", "requests_per_second_per_client": 1, "burst_per_client": 3}
    async with edge(tmp_path, stub[1], **flags) as process, client_of(process) as client:
        answers = [await detokenize(client, **bearer(ALICE)) for _ in range(6)]
        assert [answer.status_code for answer in answers[:3]] == [200] * 3
        refused = answers[-1]
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["type"] == "rate_limit_error"
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert (await detokenize(client, **bearer(BOB))).status_code == 200
        await asyncio.sleep(1.1)
        assert (await detokenize(client, **bearer(ALICE))).status_code == 200


async def test_without_keys_each_address_has_its_own_rate(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    async with (
        edge(tmp_path, stub[1], requests_per_second_per_client=1) as process,
        client_of(process) as client,
        client_of(process, transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2")) as other,
    ):
        assert [(await detokenize(client)).status_code for _ in range(3)] == [200, 429, 429]
        assert (await detokenize(other)).status_code == 200


async def test_one_clients_malformed_metadata_does_not_affect_others(
    stub: tuple[StubFrontend, str], open_edge: ClusterProcess
) -> None:
    poison = {"foo-bin": "!!!", "grpc-timeout": "junk", "grpc-encoding": "none", "grpc-status-details-bin": "?"}
    async with client_of(open_edge) as client, client_of(open_edge) as other:
        assert (await detokenize(client, **poison, authorization="Bearer mine")).status_code == 200
        assert not {*poison, "authorization"} & set(stub[0].seen[-1])
        for _ in range(3):
            assert (await detokenize(other, **{"foo-bin": "AAAA", "grpc-timeout": "5S"})).status_code == 200


async def test_a_client_cannot_steer_envoy(stub: tuple[StubFrontend, str], open_edge: ClusterProcess) -> None:
    async with client_of(open_edge) as client:
        stub[0].delay_s = 0.1
        steering = {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-max-retries": "99", "x-client-id": "root"}
        assert (await detokenize(client, **steering)).status_code == 200
    stub[0].delay_s = 0.0
    assert not set(steering) & set(stub[0].seen[-1])


async def test_a_body_over_the_bound_is_413(open_edge: ClusterProcess) -> None:
    async with client_of(open_edge) as client:
        for path in ("/v1/detokenize", "/v1/generate", "/v1/chat/completions"):
            response = await client.post(path, json={"prompt": "x" * 5000})
            assert response.status_code == 413, path
            assert error_of(response)["message"] == "the body is larger than 4096 bytes"


async def test_headers_are_taken_or_refused_never_by_chance(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    async with edge(tmp_path, stub[1], headers_kib_max=24) as process, client_of(process) as client:
        for _ in range(5):
            assert (await detokenize(client, **{"x-long": "a" * 23_000})).status_code == 200
            assert (await client.get(f"/v1/tandem/models/{'m' * 23_000}")).status_code == 200
        many = {f"x-{number}": "a" * 300 for number in range(50)}
        assert (await detokenize(client, **many)).status_code == 200
        response = await detokenize(client, **{"x-long": "a" * 25_000})
        assert response.status_code == 431
        assert error_of(response)["message"] == "the headers are too large or too many"


async def resets(address: str, stub: StubFrontend, reset_every: int, count: int) -> int:
    """Send so many requests over one HTTP/2 connection, one after the other, and reset each n-th after its first bytes.

    Returns how many were sent when the edge closed the connection; `count` if it did not.
    """
    reader, writer = await asyncio.open_connection(*address.split(":"))
    reading = asyncio.create_task(reader.read(-1))
    encoder, body = hpack.Encoder(), b'{"token_ids": [1]}'
    headers = {":method": "POST", ":scheme": "http", ":authority": "localhost", ":path": "/v1/detokenize"}
    block = partial(encoder.encode, list({**headers, "content-type": "application/json"}.items()))
    writer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0")
    try:
        for number in range(count):
            name, fields, seen = (2 * number + 1).to_bytes(4), block(), len(stub.seen)
            writer.write(len(fields).to_bytes(3) + b"\1\4" + name + fields)
            if number % reset_every == 0:
                writer.write(b"\0\0\4\3\0" + name + b"\0\0\0\x08")
                await asyncio.sleep(0.002)
            else:
                writer.write(len(body).to_bytes(3) + b"\0\1" + name + body)
                await assert_eventually(partial(len, stub.seen), seen.__lt__, within_s=5, every_s=0.002)
            if reading.done():
                return number
        return count
    finally:
        writer.transport.abort()
        reading.cancel()


async def test_a_connection_of_resets_is_closed(stub: tuple[StubFrontend, str], open_edge: ClusterProcess) -> None:
    assert 40 <= await resets(open_edge.address, stub[0], reset_every=1, count=400) <= 100


async def test_a_client_may_cancel_a_third_of_its_requests(
    stub: tuple[StubFrontend, str], open_edge: ClusterProcess
) -> None:
    assert await resets(open_edge.address, stub[0], reset_every=3, count=400) == 400


def request_bytes(*lines: str, body: bytes = b"") -> bytes:
    head = ["POST /v1/detokenize HTTP/1.1", "host: localhost", "content-type: application/json", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request_bytes("content-length: 100", body=b'{"token'), 408),
        (request_bytes("transfer-encoding: chunked", body=b"5\r\n{"), 408),
        (request_bytes("content-length: 2")[:-2], 408),
        (request_bytes("content-length: 2", f"x-long: {'a' * 5000}", body=b"{}"), 431),
        (request_bytes("content-length: 2", *[f"x-{n}: a" for n in range(30)], body=b"{}"), 431),
        (request_bytes("content-length: 2", "content-length: 3", body=b"{}"), 400),
        (request_bytes("content-length: 2", "transfer-encoding: chunked", body=b"{}"), 400),
        (b"not http at all\r\n\r\n", 400),
    ],
)
async def test_bytes_that_are_no_request(open_edge: ClusterProcess, sent: bytes, status: int) -> None:
    answered, error = await exchange(open_edge.address, sent)
    assert answered == status
    if error is not None:
        assert error["type"] == ("timeout_error" if status == 408 else "invalid_request_error")


async def test_an_answer_may_take_longer_than_its_request(
    stub: tuple[StubFrontend, str], open_edge: ClusterProcess
) -> None:
    async def slow() -> AsyncIterator[HttpBody]:
        await asyncio.sleep(1)
        yield HttpBody(content_type="text/event-stream", data=b"data: late\n\n")

    stub[0].stream = slow
    async with client_of(open_edge) as client:
        response = await client.post("/v1/generate", json={"prompt": "x"})
    assert (response.status_code, response.text) == (200, "data: late\n\n")


PREFLIGHT = {"origin": "https://chat.example", "access-control-request-method": "POST"}


async def test_cors_is_off(open_edge: ClusterProcess) -> None:
    async with client_of(open_edge) as client:
        preflight = await client.options("/v1/generate", headers=PREFLIGHT)
        call = await detokenize(client, origin="https://chat.example")
    assert preflight.status_code == 405
    for response in (preflight, call):
        assert not [name for name in response.headers if name.startswith("access-control-")]


async def test_cors_is_for_the_origins_named(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    flags = {"cors_origins": "https://chat.example,http://localhost:3000", "api_keys": tmp_path / "keys"}
    async with edge(tmp_path, stub[1], **flags) as process, client_of(process) as client:
        preflight = await client.options("/v1/generate", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        allowed = preflight.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "content-type", "x-api-key", "x-session-id"} <= {*allowed}
        call = await detokenize(client, origin="http://localhost:3000", **bearer(ALICE))
        assert call.headers["access-control-allow-origin"] == "http://localhost:3000"
        for origin in ("https://chat.example.evil", "https://evil", "null"):
            other = await client.options("/v1/generate", headers={**PREFLIGHT, "origin": origin})
            assert "access-control-allow-origin" not in other.headers


async def test_a_new_certificate_is_taken_without_a_restart(stub: tuple[StubFrontend, str], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("edge")
    trusted = ssl.create_default_context(cafile=str(authority.ca))

    async with edge(tmp_path, stub[1], tls_cert=cert, tls_key=key) as process:
        host, port = process.address.split(":")

        async def shown() -> int:
            _, writer = await asyncio.open_connection(host, int(port), ssl=trusted)
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return x509.load_der_x509_certificate(der).serial_number

        async with httpx.AsyncClient(base_url=f"https://{process.address}", verify=trusted) as client:
            response = await detokenize(client)
        assert response.status_code == 200
        assert response.headers["strict-transport-security"]
        before, pid = await shown(), process.pid
        authority.issue("edge")
        after = x509.load_pem_x509_certificate(cert.read_bytes()).serial_number
        assert after != before
        await assert_eventually(shown, lambda serial: serial == after, within_s=5, what="the new certificate")
        assert process.pid == pid
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await exchange(process.address, request_bytes("content-length: 2", body=b"{}"))


async def tls_frontend(authority: Authority, name: str, stub: StubFrontend) -> tuple[grpc.aio.Server, str]:
    cert, key = authority.issue(name)
    server = grpc.aio.server()
    servicer: Any = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set(HEALTH_SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    partial(pb_grpc.add_InferenceServiceServicer_to_server, stub)(server)
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], authority.ca.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_mutual_tls_with_the_frontends(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "tls"), Authority(tmp_path / "other", "other")
    cert, key = authority.issue("edge")
    ours = {"upstream_tls_ca": authority.ca, "upstream_tls_cert": cert, "upstream_tls_key": key}
    theirs = dict(zip(("upstream_tls_cert", "upstream_tls_key"), stranger.issue("edge"), strict=True))
    server, address = await tls_frontend(authority, "frontend", StubFrontend())  # type: ignore[abstract]  # its other methods answer UNIMPLEMENTED
    try:
        for flags, status in (
            (ours, 200),
            ({**ours, "upstream_tls_names": "localhost"}, 200),
            ({**ours, "upstream_tls_names": "frontend.elsewhere"}, 503),
            ({**ours, "upstream_tls_ca": stranger.ca}, 503),
            ({**ours, **theirs}, 503),
            ({"upstream_tls_ca": authority.ca}, 503),
            ({}, 503),
        ):
            async with edge(tmp_path, address, **flags) as process, client_of(process) as client:
                assert (await detokenize(client)).status_code == status, flags
    finally:
        await server.stop(0)


async def ended(tmp_path: Path, *flags: str) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "tandem_edge", "--frontends", "127.0.0.1:1", *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=tmp_path)
    _, err = await process.communicate()
    return process.returncode, err.decode().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["--host", "0.0.0.0"], 2, "api_keys: is required to listen on 0.0.0.0; or set insecure_open"),
        (["--host", "edge.example"], 2, "host: must be an IP address"),
        (["--tls-cert", "x"], 2, "tls_key: must be given with tls_cert"),
        (["--api-keys", "nowhere"], 2, "api_keys: nowhere cannot be read"),
        (["--envoy", "/nowhere/envoy"], 1, "envoy: /nowhere/envoy is not an executable file"),
        (["--host", "192.0.2.1", "--insecure-open", "true"], 1, "cannot listen on 192.0.2.1:0"),
    ],
)
async def test_what_cannot_start_is_one_sentence(tmp_path: Path, flags: list[str], status: int, sentence: str) -> None:
    code, last = await ended(tmp_path, *flags)
    assert code == status
    assert last.startswith(f"tandem-edge: {sentence}")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example"]
)
async def test_a_name_that_resolves_to_loopback_does_not_reach_an_open_edge(
    open_edge: ClusterProcess, keyed_edge: ClusterProcess, host: str
) -> None:
    async with client_of(open_edge) as client:
        for path in ("/v1/detokenize", "/v1/models", "/"):
            refused = await client.post(path, json={"ids": [1]}, headers={"host": host})
            assert refused.status_code == 403, path
            assert "host_names" in refused.json()["error"]["message"]
    async with client_of(keyed_edge) as client:
        assert (await client.post("/v1/detokenize", json={}, headers={"host": host})).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8080", "LOCALHOST"])
async def test_names_of_loopback_reach_an_open_edge(open_edge: ClusterProcess, host: str) -> None:
    async with client_of(open_edge) as client:
        assert (await client.post("/v1/detokenize", json={"token_ids": [1]}, headers={"host": host})).status_code == 200


async def test_an_open_edge_says_so(open_edge: ClusterProcess, keyed_edge: ClusterProcess) -> None:
    assert "no API keys (api_keys): unauthenticated access on 127.0.0.1" in open_edge.log.read_text()
    assert "no API keys" not in keyed_edge.log.read_text()
