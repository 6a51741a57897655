"""The check that containers run: it says what the service says, over TLS too, and imports nothing that takes time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tandem.rpc.server import RpcServer
from tandem.tls.paths import Tls
from tests.integration.support.certificates import Authority
from tests.integration.support.edge_host import edge, stub_frontend


@asynccontextmanager
async def server(*, serving: bool, tls: Tls | None = None) -> AsyncIterator[int]:
    rpc = RpcServer(tls=tls)
    await rpc.start("127.0.0.1", 0)
    await rpc.set_serving(serving)
    try:
        yield rpc.port
    finally:
        await rpc.stop(0)


async def probe(service: str, variables: Mapping[str, str]) -> tuple[int, str]:
    """Its exit status, and what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TANDEM_")} | dict(variables)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem.service.healthcheck", service),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode().strip()


@pytest.mark.parametrize(("serving", "expected"), [(True, (0, "serving")), (False, (1, "not serving"))])
async def test_it_says_what_the_service_says(serving: bool, expected: tuple[int, str]) -> None:
    async with server(serving=serving) as port:
        assert await probe("registry", {"TANDEM_REGISTRY_PORT": str(port)}) == expected


@pytest.mark.parametrize(("serving", "expected"), [(True, (0, "serving")), (False, (1, "not serving"))])
async def test_it_shows_the_services_own_certificate(serving: bool, expected: tuple[int, str], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("decode")
    async with server(serving=serving, tls=Tls(cert=cert, key=key, ca=authority.ca)) as port:
        variables = {"TANDEM_DECODE_PORT": str(port), "TANDEM_DECODE_TLS_CERT": str(cert)}
        assert await probe("decode", {**variables, "TANDEM_DECODE_TLS_KEY": str(key)}) == expected
        status, _ = await probe("decode", variables)
        assert status == 1  # a client without a certificate gets no response


async def test_a_probe_of_a_closed_port_fails() -> None:
    status, said = await probe("frontend", {"TANDEM_FRONTEND_PORT": "1"})
    assert status == 1
    assert said == "127.0.0.1:1 is unreachable: [Errno 111] Connection refused"


async def test_a_probe_without_a_port_names_the_setting() -> None:
    assert await probe("frontend", {}) == (2, "TANDEM_FRONTEND_PORT must be a port number")


async def test_an_edge_is_asked_over_http(tmp_path: Path) -> None:
    async with stub_frontend() as (_, address), edge(tmp_path, address) as process:
        port = process.address.rpartition(":")[2]
        assert await probe("edge", {"TANDEM_EDGE_PORT": port}) == (0, "serving")
    async with edge(tmp_path, "127.0.0.1:1") as process:
        port = process.address.rpartition(":")[2]
        assert await probe("edge", {"TANDEM_EDGE_PORT": port}) == (1, "not serving")


def test_it_imports_the_standard_library_only() -> None:
    shown = "import sys, tandem.service.healthcheck; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    names = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "google", "pydantic", "typer", "asyncio"} & set(names)
