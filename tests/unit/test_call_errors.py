"""What a person reads when a call to an address fails before the process there could say anything."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.cli.membership import checked_address
from tandem.client import admin_calls, calls
from tandem.client.call_errors import call_error
from tandem.errors import ConfigError, DeadlinePassed, ServiceError, TandemError
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls

GRPC_WORDS = ("last error", "failed to connect", "ipv4:", "UNKNOWN", "SSL_ERROR", "field:")


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    issue_all(tmp_path / "certs")
    found = client_tls(tmp_path / "certs")
    assert found is not None
    return found


@asynccontextmanager
async def listening(tls: Tls | None = None) -> AsyncIterator[str]:
    """The address of a gRPC server without services; with TLS it demands the client's certificate."""
    server = grpc.aio.server()
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        own = Tls.in_directory(tls.ca.parent, "registry")
        pair = (own.key.read_bytes(), own.cert.read_bytes())
        credentials = grpc.ssl_server_credentials([pair], own.ca.read_bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def sentence(address: str, tls: Tls | None = None) -> str:
    with pytest.raises(ServiceError) as failed:
        await calls.is_serving(address, tls=tls)
    text = failed.value.message
    assert text.startswith(f"{address} ")
    assert not [words for words in GRPC_WORDS if words in text]
    return text


async def test_nothing_listens() -> None:
    assert await sentence("127.0.0.1:1") == (
        "127.0.0.1:1 cannot be reached: nothing listens there; start the process, or correct the address"
    )


async def test_the_host_is_unknown() -> None:
    assert "DNS does not know the host" in await sentence("nowhere.invalid:1")


async def test_every_call_says_so() -> None:
    with pytest.raises(ServiceError, match="nothing listens there"):
        await admin_calls.request_timelines("127.0.0.1:1", "r-1")
    with pytest.raises(ServiceError, match="nothing listens there"):
        await calls.list_members("127.0.0.1:1")
    with pytest.raises(ServiceError, match="nothing listens there"):
        await anext(calls.generate("127.0.0.1:1", pb.GenerateRequest()))


async def test_tls_is_missing_on_either_side(tls: Tls) -> None:
    async with listening(tls) as address:
        assert "if it serves TLS, pass the directory of its certificates (--tls DIR)" in await sentence(address)
    async with listening() as address:
        assert "serves no TLS, and was called with it: omit --tls" in await sentence(address, tls)


async def test_the_certificate_is_of_another_authority(tls: Tls, tmp_path: Path) -> None:
    issue_all(tmp_path / "other")
    async with listening(tls) as address:
        text = await sentence(address, client_tls(tmp_path / "other"))
    assert "presents a certificate that was not accepted" in text
    assert str(tmp_path / "other" / "ca.pem") in text


async def test_a_process_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "accepted the connection and sent nothing" in await sentence(f"127.0.0.1:{silent.getsockname()[1]}")


def failure(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


def test_a_connection_that_breaks_within_a_response_is_no_question_of_tls() -> None:
    broken = failure(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    text = str(call_error(broken, "a:1", None, has_responded=True))
    assert text == "a:1 closed the connection within its response: it may have died; see its log"


def test_a_process_that_does_not_respond_is_named() -> None:
    late = failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    error = call_error(late, "a:1", None)
    assert isinstance(error, DeadlinePassed)
    assert str(error).startswith("a:1 did not respond in time")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND])
def test_what_the_process_itself_says_stays(code: grpc.StatusCode) -> None:
    error = call_error(failure(code, "the sentence of a process"), "a:1", None)
    assert isinstance(error, TandemError)
    assert "the sentence of a process" in str(error)


def test_an_address_is_checked_before_it_is_called() -> None:
    assert checked_address("[::1]:5", "ADDRESS") == "[::1]:5"
    for text in ("nowhere", "a:1,b:2", "srv://a", "a:99999", ""):
        with pytest.raises(ConfigError, match="must be host:port, not"):
            checked_address(text, "ADDRESS")
