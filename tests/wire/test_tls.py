"""Mutual TLS on the wire: who is let in and who is not, what both sides present, and renewal under running streams."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography import x509
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tandem_registry.app import RegistryApp
from tandem_registry.config import RegistryConfig

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.client import calls
from tandem.discovery import Registration, WorkerWatch
from tandem.errors import ServiceError, StartError
from tandem.rpc.channels import OPTIONS, Channels, open_channel
from tandem.rpc.service_host import is_loopback
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls
from tests.wire.support.registry_host import TTL_S, error_of, make_worker, register_request

REFUSED_WITHIN_S = 2.0

pytestmark = pytest.mark.usefixtures("server_type")


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    issue_all(tmp_path / "certs")
    return tmp_path / "certs"


@pytest.fixture
def tls(certs: Path) -> Tls:
    return Tls.in_directory(certs, "client")


@asynccontextmanager
async def serving(certs: Path, port: int = 0) -> AsyncIterator[RegistryApp]:
    own = Tls.in_directory(certs, "registry")
    settings: dict[str, Any] = {"tls_cert": own.cert, "tls_key": own.key, "tls_ca": own.ca, "port": port}
    async with RegistryApp.open(RegistryConfig(**settings, lease_ttl_s=TTL_S, drain_settle_s=0)) as app:
        yield app


@pytest_asyncio.fixture
async def app(certs: Path) -> AsyncIterator[RegistryApp]:
    async with serving(certs) as app:
        yield app


def serial_of(file: Path) -> int:
    return x509.load_pem_x509_certificate(file.read_bytes()).serial_number


async def presented_by(address: str, tls: Tls) -> int:
    """Serial number of the certificate that a server presents to a new connection."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return int(certificate["serialNumber"], 16)


@asynccontextmanager
async def mirror(server_type: Any, certs: Path) -> AsyncIterator[str]:
    """A server that streams, again and again, the serial number of the certificate its caller has presented."""

    async def stream(_: bytes, context: Any) -> AsyncIterator[bytes]:
        certificate = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
        while True:
            yield b"%x" % certificate.serial_number
            await asyncio.sleep(0.01)

    def add(server: Any) -> None:
        handlers: dict[str, Any] = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mirror.Mirror", handlers),))

    server = server_type(tls=Tls.in_directory(certs, "decode"))
    server.add("mirror.Mirror", add)
    await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


def stream_of(channel: grpc.aio.Channel) -> Any:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/mirror.Mirror/Stream")
    return method(b"")


async def test_who_has_a_certificate_is_served(app: RegistryApp, tls: Tls) -> None:
    assert await calls.is_serving(app.address, tls=tls)
    assert await calls.list_workers(app.address, tls=tls) == []


async def expired(certs: Path, other: Path) -> Any:
    """Signed by the right CA, but long ago. Our own code would not even present it."""
    old = Tls.in_directory(certs, "client")
    issue_all(certs, days=1, now=datetime.now(UTC) - timedelta(days=3))
    return grpc.ssl_channel_credentials(old.ca.read_bytes(), old.key.read_bytes(), old.cert.read_bytes())


async def of_another_ca(certs: Path, other: Path) -> Any:
    stranger = Tls.in_directory(other, "client")
    return grpc.ssl_channel_credentials(
        (certs / "ca.pem").read_bytes(), stranger.key.read_bytes(), stranger.cert.read_bytes()
    )


async def without_certificate(certs: Path, other: Path) -> Any:
    return grpc.ssl_channel_credentials((certs / "ca.pem").read_bytes())


async def who_trusts_another_ca(certs: Path, other: Path) -> Any:
    own, stranger = Tls.in_directory(certs, "client"), Tls.in_directory(other, "client")
    return grpc.ssl_channel_credentials(stranger.ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes())


async def in_plaintext(certs: Path, other: Path) -> Any:
    return None


@pytest.mark.parametrize(
    "caller",
    [expired, of_another_ca, without_certificate, who_trusts_another_ca, in_plaintext],
    ids=lambda c: c.__name__,
)
async def test_who_has_none_is_refused_at_once(certs: Path, tmp_path: Path, caller: Any) -> None:
    issue_all(tmp_path / "other")
    async with serving(certs) as app:
        good = open_channel(app.address, client_tls(certs))
        assert (await RegistryServiceStub(good).List(pb.ListRequest())).workers == []
        credentials = await caller(certs, tmp_path / "other")
        begin_s = time.monotonic()
        if credentials is None:
            channel = grpc.aio.insecure_channel(app.address, options=OPTIONS)
        else:
            channel = grpc.aio.secure_channel(app.address, credentials, options=OPTIONS)
        problem = await error_of(RegistryServiceStub(channel).List(pb.ListRequest()))
        assert isinstance(problem, ServiceError)
        assert problem.reason == "UNAVAILABLE"
        assert time.monotonic() - begin_s < REFUSED_WITHIN_S
        assert (await RegistryServiceStub(good).List(pb.ListRequest())).workers == []
        await channel.close()
        await good.close()


async def test_health_and_reflection_ask_for_a_certificate_too(app: RegistryApp, tls: Tls) -> None:
    with pytest.raises(ServiceError):
        await calls.is_serving(app.address)

    async def names(channel: grpc.aio.Channel) -> list[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return [service.name for service in (await call.read()).list_services_response.service]

    async with open_channel(app.address) as plain:
        assert isinstance(await error_of(names(plain)), ServiceError)
    async with open_channel(app.address, tls) as channel:
        assert "grpc.health.v1.Health" in await names(channel)


async def test_a_server_of_another_name_is_refused(server_type: Any, certs: Path, tls: Tls) -> None:
    """A certificate is only good for the addresses in it: 127.0.0.2 is not."""
    server = server_type(tls=Tls.in_directory(certs, "registry"))
    server.bind("127.0.0.2", 0)
    await server.serve()
    address = f"127.0.0.2:{server.port}"
    try:
        with pytest.raises(ServiceError, match="127\\.0\\.0\\.2"):
            await calls.is_serving(address, tls=tls)
        issue_all(certs, ["127.0.0.2"])
        assert not await calls.is_serving(address, tls=tls)
    finally:
        await server.stop(0)


@asynccontextmanager
async def slow_way_to(address: str, delay_s: float) -> AsyncIterator[str]:
    """A port that leads to another one, each piece late by `delay_s`."""
    host, _, port = address.rpartition(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65_536):
            await asyncio.sleep(delay_s)
            writer.write(piece)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer), return_exceptions=True)

    way = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with way:
        yield f"127.0.0.1:{way.sockets[0].getsockname()[1]}"


async def test_a_slow_handshake_is_waited_for(app: RegistryApp, tls: Tls) -> None:
    async with slow_way_to(app.address, 0.1) as address:
        assert await calls.is_serving(address, tls=tls)


async def test_a_server_presents_the_renewed_certificate(certs: Path, app: RegistryApp, tls: Tls) -> None:
    file = certs / "registry.pem"
    for _ in range(3):
        assert await presented_by(app.address, tls) == serial_of(file)
        issue_all(certs)


async def test_half_written_files_leave_a_server_as_it_was(
    certs: Path, app: RegistryApp, tls: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    file = certs / "registry.pem"
    whole, serial = file.read_bytes(), serial_of(file)
    for content in (whole[:100], b"", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert await presented_by(app.address, tls) == serial
    assert sum("stays in use" in record.getMessage() for record in caplog.records) == 1
    assert await calls.is_serving(app.address, tls=tls)
    issue_all(certs)
    assert await presented_by(app.address, tls) == serial_of(file) != serial


async def test_channels_are_replaced_under_a_running_stream(server_type: Any, certs: Path, tls: Tls) -> None:
    channels = Channels(tls)
    async with mirror(server_type, certs) as address:
        former = serial_of(tls.cert)
        running = stream_of(channels.get(address))
        assert int(await running.read(), 16) == former
        assert channels.get(address) is channels.get(address)
        issue_all(certs)
        renewed = stream_of(channels.get(address))
        assert int(await renewed.read(), 16) == serial_of(tls.cert) != former
        for _ in range(50):
            assert int(await running.read(), 16) == former
        running.cancel()
        renewed.cancel()
        await channels.close()


async def test_channels_keep_what_they_have_while_files_are_damaged(server_type: Any, certs: Path, tls: Tls) -> None:
    channels = Channels(tls)
    async with mirror(server_type, certs) as address:
        channel = channels.get(address)
        tls.cert.write_text("half")
        assert channels.get(address) is channel
        assert await stream_of(channel).read()
        await channels.close()


async def test_membership_streams_outlive_renewal_and_come_back_with_what_is_new(certs: Path) -> None:
    """Registration and watch hold one stream each. Another CA altogether: only who read it again comes back."""
    worker_tls, frontend_tls = (Tls.in_directory(certs, name) for name in ("decode", "frontend"))
    async with serving(certs) as app:
        port = int(app.address.rpartition(":")[2])
        registration = Registration([app.address], make_worker(), tls=worker_tls)
        watch = WorkerWatch([app.address], tls=frontend_tls)
        await registration.start()
        await watch.start()
        await watch.wait_for(bool, 5)
        issue_all(certs)
        await asyncio.sleep(2 * TTL_S)
        assert registration.registered
        assert watch.state.is_live
        for name in ("ca.pem", "ca-key.pem"):
            (certs / name).unlink()
        issue_all(certs)
    await assert_eventually(lambda: watch.state.is_live, lambda live: not live, what="an outage")
    async with serving(certs, port):
        await assert_eventually(lambda: watch.state.is_live and registration.registered, within_s=5)
        assert [worker.worker_id for worker in watch.workers()] == ["decode-0"]
        await registration.close()
        await watch.close()


async def test_a_worker_in_plaintext_is_not_registered(app: RegistryApp, tls: Tls) -> None:
    async with open_channel(app.address) as channel:
        assert isinstance(await error_of(RegistryServiceStub(channel).Register(register_request())), ServiceError)
    assert await calls.list_workers(app.address, tls=tls) == []


async def test_damaged_files_stop_the_start(certs: Path) -> None:
    (certs / "registry.pem").write_text("damaged")
    with pytest.raises(StartError, match=r"registry\.pem is damaged, or contains no certificate"):
        async with serving(certs):
            pass
    with pytest.raises(StartError, match=r"nowhere/client\.pem cannot be read"):
        await calls.is_serving("127.0.0.1:1", tls=client_tls(certs / "nowhere"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.0.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.7", False),
        ("gpu-7", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "with_tls", "count"), [("0.0.0.0", False, 1), ("127.0.0.1", False, 0), ("0.0.0.0", True, 0)]
)
async def test_plaintext_beyond_this_machine_is_logged_once(
    server_type: Any, tls: Tls, caplog: pytest.LogCaptureFixture, host: str, with_tls: bool, count: int
) -> None:
    server = server_type(tls=tls if with_tls else None)
    with caplog.at_level(logging.WARNING):
        await server.start(host, 0)
    await server.stop(0)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "listening on 0.0.0.0 without TLS"
    ] * count
