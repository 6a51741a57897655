"""A cluster of processes that ask each other for certificates: streams, refusals, renewal, damaged files."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography import x509

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client import calls
from tandem.client.role_calls import change_role
from tandem.domain.worker import WorkerRole
from tandem.errors import ServiceError, StartError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import OPTIONS, open_channel
from tandem.rpc.convert import ROLES
from tandem.rpc.status import from_rpc_error
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls
from tests.integration.conftest import DEMO_MODEL, SIMULATED, running
from tests.integration.support.calls import request_of
from tests.integration.support.command_line import wait_state

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

STORY = "Once upon a time there was a fox"
TANDEM = [sys.executable, "-m", "tandem.cli"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A pair, an aggregated worker, a frontend and a registry on a port it keeps when it is started again."""
    certs = tmp_path_factory.mktemp("certs")
    issue_all(certs)
    registry = {"registry": {"port": str(free_port())}}
    spec: dict[str, Any] = {"engine": "simulated", "aggregated": 1, "worker_flags": SIMULATED, "role_flags": registry}
    async with running(tmp_path_factory.mktemp("tls"), tls=certs, **spec) as cluster:
        yield cluster


def certs_of(cluster: LocalCluster) -> Path:
    assert cluster.spec.tls is not None
    return cluster.spec.tls


async def text_of(cluster: LocalCluster, max_tokens: int = 16) -> str:
    request = request_of(STORY, max_tokens=max_tokens, ignore_eos=True)
    tls = client_tls(cluster.spec.tls)
    text = ""
    async with aclosing(calls.generate(cluster.frontend.address, request, 30, tls=tls)) as events:
        async for event in events:
            text += event.chunk.text
    assert event.HasField("finish")
    assert event.finish.usage.completion_tokens == max_tokens
    return text


async def presented_by(address: str, certs: Path) -> int:
    """Serial number of the certificate a process presents to a new connection."""
    tls = Tls.in_directory(certs, "client")
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return int(certificate["serialNumber"], 16)


def serial_of(certs: Path, role: str) -> int:
    name = "decode" if role == "aggregated" else role
    return x509.load_pem_x509_certificate((certs / f"{name}.pem").read_bytes()).serial_number


async def run(*command: str, state: Path) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TANDEM_STATE": str(state), "COLUMNS": "200"},
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_role_changes_over_certificates_and_back(cluster: LocalCluster) -> None:
    tls = client_tls(cluster.spec.tls)
    # One process of each role: the registry refuses without force.
    for role in (WorkerRole.DECODE, WorkerRole.AGGREGATED):
        steps = change_role(cluster.registry.address, "aggregated-0", role, force=True, tls=tls)
        *_, done = [step async for step in steps]
        assert done.worker.role == ROLES[role]
        assert await text_of(cluster)


async def test_it_streams_text_and_every_process_has_the_certificate_of_its_role(cluster: LocalCluster) -> None:
    assert await text_of(cluster)
    for process in cluster.processes:
        assert await presented_by(process.address, certs_of(cluster)) == serial_of(certs_of(cluster), process.role)
        assert await calls.is_serving(process.address, tls=client_tls(certs_of(cluster)))


async def test_strangers_are_refused_by_every_process_which_goes_on(cluster: LocalCluster, tmp_path: Path) -> None:
    other, old = tmp_path / "other", tmp_path / "old"
    issue_all(other)
    old.mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        (old / name).write_bytes((certs_of(cluster) / name).read_bytes())
    issue_all(old, days=1, now=datetime.now(UTC) - timedelta(days=2))
    ca = (certs_of(cluster) / "ca.pem").read_bytes()
    strangers = [Tls.in_directory(directory, "client") for directory in (other, old)]
    credentials = [grpc.ssl_channel_credentials(ca, tls.key.read_bytes(), tls.cert.read_bytes()) for tls in strangers]
    for process in cluster.processes:
        opened = [grpc.aio.secure_channel(process.address, one, options=OPTIONS) for one in credentials]
        for channel in (*opened, open_channel(process.address)):
            begin_s = time.monotonic()
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await check(b"")
            assert isinstance(from_rpc_error(refused.value), ServiceError)
            assert time.monotonic() - begin_s < 2
            await channel.close()
    assert await text_of(cluster)


async def test_certificates_are_renewed_under_a_running_stream(cluster: LocalCluster) -> None:
    certs = certs_of(cluster)
    before = {process.name: serial_of(certs, process.role) for process in cluster.processes}
    async with open_channel(cluster.frontend.address, client_tls(certs)) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.Generate(request_of(STORY, max_tokens=300, ignore_eos=True))
        while not (await call.read()).HasField("chunk"):
            pass
        status, out, err = await run(sys.executable, "-m", "tandem.cli", "certs", str(certs), state=certs / "none")
        assert status == 0, err
        for process in cluster.processes:
            serial = await presented_by(process.address, certs)
            assert f"{serial:x}" in out
            assert serial != before[process.name]
        # New requests go over new connections between the processes while the former stream still runs.
        assert await text_of(cluster)
        assert not call.done()
        events: list[pb.GenerateResponse] = []
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        assert events[-1].finish.usage.completion_tokens == 300


async def test_another_ca_is_taken_over_without_restarting_who_is_not_asked(cluster: LocalCluster) -> None:
    """The registry comes back with another CA: only a worker or frontend that has read all files again can return."""
    certs = certs_of(cluster)
    cluster.registry.signal(signal.SIGKILL)
    await cluster.registry.wait_ended()
    for name in ("ca.pem", "ca-key.pem"):
        (certs / name).unlink()
    issue_all(certs)
    await cluster.restart("registry")
    tls = client_tls(certs)

    async def listed() -> set[str]:
        return {entry.worker.worker_id for entry in await calls.list_workers(cluster.registry.address, tls=tls)}

    all_workers = {"prefill-0", "decode-0", "aggregated-0"}
    await assert_eventually(listed, lambda names: names == all_workers, within_s=15, what="all workers registered")
    pids = {process.pid for process in (*cluster.workers, cluster.frontend)}
    assert await text_of(cluster)
    assert pids == {process.pid for process in (*cluster.workers, cluster.frontend)}


async def ask_over_http(address: str, certs: Path) -> dict[str, Any]:
    """One completion over HTTPS, from a client that trusts the CA and has no certificate."""
    context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
    body = {"prompt": STORY, "stopping": {"max_tokens": 4}}

    def ask() -> dict[str, Any]:
        request = urllib.request.Request(
            f"https://{address}/v1/generate:unary", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    return await asyncio.to_thread(ask)


async def test_the_edge_shows_its_certificate_to_both_sides(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    issue_all(certs)
    async with running(tmp_path / "logs", engine="simulated", edge=True, tls=certs) as cluster:
        assert cluster.edge is not None
        address = cluster.edge.address
        assert (await ask_over_http(address, certs))["finish"]["usage"]["completion_tokens"] == 4
        with pytest.raises((OSError, http.client.HTTPException)):
            await asyncio.to_thread(urllib.request.urlopen, f"http://{address}/healthz", None, 5)
        former = serial_of(certs, "edge")
        assert await presented_by(address, certs) == former
        issue_all(certs)

        async def renewed() -> bool:
            return await presented_by(address, certs) == serial_of(certs, "edge") != former

        await assert_eventually(renewed, within_s=5, what="the edge's renewed certificate")
        assert (await ask_over_http(address, certs))["finish"]["usage"]["completion_tokens"] == 4


async def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    issue_all(tmp_path / "certs")
    (tmp_path / "certs" / "decode-key.pem").write_text("damaged")
    with pytest.raises(StartError) as problem:
        async with running(tmp_path / "logs", engine="simulated", tls=tmp_path / "certs"):
            pass
    assert "decode-0 did not start: " in str(problem.value)
    assert "decode-key.pem is damaged, or contains no private key without a password in PEM format" in str(
        problem.value
    )


async def test_a_process_in_plaintext_stays_outside(cluster: LocalCluster) -> None:
    """A worker without certificates cannot enter the registry, and says why it waits."""
    flags = [f"--registry={cluster.registry.address}", f"--model={DEMO_MODEL}", "--engine=simulated"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tandem_decode", *flags, "--worker-id=stranger", stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        while b"retrying until it responds" not in await process.stderr.readline():
            pass
        listed = await calls.list_workers(cluster.registry.address, tls=client_tls(certs_of(cluster)))
        assert "stranger" not in {entry.worker.worker_id for entry in listed}
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.parametrize("module", ["tandem_registry", "tandem_prefill", "tandem_decode", "tandem_frontend"])
@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        (
            ["--tls-cert=/nowhere/c", "--tls-ca=/nowhere/a"],
            2,
            "tls_key: is missing: tls_cert, tls_key and tls_ca must ",
        ),
        (["--tls-cert=/nowhere/c", "--tls-key=/k", "--tls-ca=/a"], 1, "/nowhere/c cannot be read: No such file"),
    ],
)
async def test_a_start_with_wrong_files(
    tmp_path: Path, module: str, given: list[str], status: int, sentence: str
) -> None:
    needed = [] if module == "tandem_registry" else ["--registry=127.0.0.1:1", f"--model={DEMO_MODEL}"]
    engine = ["--engine=simulated"] if module in ("tandem_prefill", "tandem_decode") else []
    command = [sys.executable, "-m", module, *needed, *engine, "--log-level=error", *given]
    ended, _, err = await run(*command, state=tmp_path / "none")
    assert ended == status
    assert err.startswith(f"{module.replace('_', '-')}: {sentence}"), err
    assert len(err.strip().splitlines()) == 1


async def test_the_command_line_needs_no_flags_beside_up(tmp_path: Path) -> None:
    state, certs = tmp_path / "state" / "cluster.json", tmp_path / "certs"
    status, out, err = await run(*TANDEM, "certs", str(certs), "--days", "3", state=state)
    assert status == 0, err
    assert "registry.pem" in out
    up = await asyncio.create_subprocess_exec(
        *[*TANDEM, "up", "--engine", "simulated", "--no-edge", "--tls", str(certs)],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TANDEM_STATE": str(state)},
    )
    try:
        await wait_state(up, state, "serving")
        address = json.loads(state.read_text())["frontend"]
        for command in (["generate", "x", "--max-tokens", "3"], ["status"], ["health", address]):
            status, out, err = await run(*TANDEM, *command, state=state)
            assert status == 0, err
            assert out.strip()
            assert "unreachable" not in out
        for tls, expected in ((["--tls", str(certs)], 0), ([], 1), (["--tls", str(tmp_path / "none")], 2)):
            ended = await run(*TANDEM, "health", address, *tls, state=tmp_path / "elsewhere")
            assert ended[0] == expected
            assert "Traceback" not in ended[2]
    finally:
        up.terminate()
        await up.communicate()
    assert up.returncode == 0


async def test_certs_refuses_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, status, words in (
        ([str(tmp_path / "c"), "--days", "0"], 2, "tandem certs: --days: must be 1 to 825, not 0"),
        ([str(tmp_path / "c"), "--host", "a b"], 2, "tandem certs: --host: 'a b' is neither a host name nor an IP"),
        ([str(tmp_path / "file")], 1, "cannot be written: "),
    ):
        ended, _, err = await run(*TANDEM, "certs", *options, state=tmp_path / "none")
        assert ended == status
        assert words in err
        assert len(err.strip().splitlines()) == 1
