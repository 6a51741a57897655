"""Whole clusters on IPv6: every process, with TLS, with Consul, with the real engine; and both families at a time."""

from __future__ import annotations

import importlib.util
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.client import calls
from tandem.domain.network_address import join_address, split_address
from tandem.local_cluster.cluster import LocalCluster
from tandem.local_cluster.consul import ClusterConsul
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, cluster_up, run, state_of
from tests.integration.test_probe import probe

LOOPBACK = "::1"
ROLES = ("registry", "prefill", "decode", "frontend", "edge")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((LOOPBACK, 0))
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
    pytest.mark.skipif(not has_ipv6(), reason="the loopback interface of this machine has no ::1"),
]


async def answers_over_http(address: str, ca: Path | None = None) -> None:
    body: dict[str, Any] = {"model": "tandem-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    scheme, verify = ("http", True) if ca is None else ("https", ssl.create_default_context(cafile=str(ca)))
    async with httpx.AsyncClient(base_url=f"{scheme}://{address}", timeout=20, verify=verify) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 4


def assert_all_on_ipv6(cluster: LocalCluster) -> None:
    for process in (*cluster.registries, *cluster.workers, *cluster.frontends, *cluster._edges):
        assert split_address(process.address)[0] == LOOPBACK, process.name
        assert process.address.startswith("["), process.name


async def test_a_cluster_serves_on_the_ipv6_loopback(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"engine": "simulated", "worker_flags": SIMULATED, "metrics": True}
    async with running(tmp_path, host=LOOPBACK, edge=True, **spec) as cluster:
        assert_all_on_ipv6(cluster)
        stream = await generate(cluster, request_of("Once upon a time"))
        assert stream.finish.timings.kv_transfer_bytes > 0
        assert cluster.edge is not None
        await answers_over_http(cluster.edge.address)
        for process in cluster.processes:
            assert process.metrics_address is not None
            async with httpx.AsyncClient(timeout=10) as client:
                page = await client.get(f"http://{process.metrics_address}/metrics")
            assert page.status_code == 200, process.name
        workers = await calls.list_workers(cluster.registry.address)
        assert {split_address(entry.worker.address)[0] for entry in workers} == {LOOPBACK}


async def test_every_address_is_listened_on_in_both_families(tmp_path: Path) -> None:
    every = {"host": "[::]", "advertise-host": f"[{LOOPBACK}]"}
    roles = {role: dict(every) for role in ROLES}
    roles["edge"] |= {"insecure-open": "true"}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, role_flags=roles, edge=True) as cluster:
        assert_all_on_ipv6(cluster)
        assert cluster.edge is not None
        await generate(cluster, request_of("Once"))
        for process in (cluster.registry, *cluster.workers, cluster.frontend):
            port = split_address(process.address)[1]
            assert await calls.is_serving(join_address("127.0.0.1", port)), process.name
        for host in (LOOPBACK, "127.0.0.1"):
            await answers_over_http(join_address(host, split_address(cluster.edge.address)[1]))
        variables = {"TANDEM_FRONTEND_HOST": "::", "TANDEM_FRONTEND_PORT": cluster.frontend.flags["port"]}
        assert await probe("frontend", variables) == (0, "serving")


async def test_certificates_hold_on_the_ipv6_loopback(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    issue_all(certs)
    async with running(
        tmp_path, host=LOOPBACK, engine="simulated", worker_flags=SIMULATED, tls=certs, edge=True
    ) as cluster:
        assert cluster.edge is not None
        await answers_over_http(cluster.edge.address, certs / "ca.pem")


async def test_consul_has_the_members_with_their_ipv6_addresses(consul_binary: Path, tmp_path: Path) -> None:
    consul = ClusterConsul(binary=consul_binary)
    spec: dict[str, Any] = {"engine": "simulated", "worker_flags": SIMULATED, "registries": 2}
    async with running(tmp_path, host=LOOPBACK, consul=consul, edge=True, **spec) as cluster:
        assert cluster.edge is not None
        assert cluster.consul is not None
        await answers_over_http(cluster.edge.address)

        async def passing() -> set[str]:
            found = await cluster.consul.access.get("/v1/health/service/tandem?passing")  # type: ignore[union-attr]
            return {join_address(entry["Service"]["Address"], entry["Service"]["Port"]) for entry in found}

        members = [*cluster.registries, *cluster.workers, *cluster.frontends]
        everyone = {process.address for process in members}
        await assert_eventually(passing, lambda found: found == everyone, within_s=20, what="health checks that pass")
        named = f"srv://registry.tandem.service.consul@{cluster.consul.dns}"
        status, shown, _ = await run(*TANDEM, "status", "--address", named, state=tmp_path / "none.json")
        assert status == 0
        assert cluster.workers[0].address in shown


async def test_the_command_line_takes_ipv6_with_and_without_brackets(state: Path) -> None:
    async with cluster_up(state, "--host", "[::1]"):
        assert split_address(state_of(state)["frontend"])[0] == LOOPBACK
        status, text, _ = await run(*TANDEM, "generate", "Once", "--max-tokens", "4", state=state)
        assert status == 0
        assert text.strip()
    for host, reason in (
        ("::", "must be one address of this machine, not ::"),
        ("2001:db8::1", "2001:db8::1 is no address of this machine"),
        ("[::1]:80", "must be a host without a port"),
    ):
        status, _, error = await run(*TANDEM, "up", "--engine", "simulated", "--host", host, state=state)
        assert (status, reason in error) == (2, True), error


@pytest.mark.engine_sglang
@pytest.mark.timeout(240)
@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt")
async def test_the_real_engine_hands_kv_over_on_ipv6(tmp_path: Path) -> None:
    async with running(tmp_path, host=LOOPBACK, worker_flags={"dtype": "float32"}) as cluster:
        assert_all_on_ipv6(cluster)
        finish = (await generate(cluster, request_of("Once upon a time there was a fox"))).finish
        assert finish.timings.kv_transfer_bytes > 0
        assert finish.timings.recomputed_tokens == 0
