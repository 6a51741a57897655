"""A real Consul agent as local clusters and tests start it: ports, data, faults, certificates, its own last words."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tandem.errors import StartError
from tandem.local_cluster.consul_agent import AgentSpec, ConsulAgent
from tandem.local_cluster.consul_http import ConsulAccess
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls
from tests.integration.conftest import REPOSITORY
from tests.integration.support.consul_host import consul_agent, consul_servers, dns_counts

NO_SUCH_NAME = 3
pytestmark = pytest.mark.timeout(120)


def test_an_agent_takes_the_service_definitions_for_prometheus(consul_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text(json.dumps({"data_dir": str(tmp_path / "data")}))
    shutil.copy(REPOSITORY / "deploy" / "consul" / "metrics.json", tmp_path)
    checked = subprocess.run([consul_binary, "validate", tmp_path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


async def test_an_agent_in_memory_forgets_and_one_with_data_does_not(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path / "memory") as host:
        await host.access.put("/v1/kv/word", b"kept")
        await host.stop(host.first)
        await host.restart(host.first)
        with pytest.raises(StartError, match="404"):
            await host.access.get("/v1/kv/word")
    async with consul_servers(consul_binary, tmp_path / "disk", count=1) as host:
        await host.access.put("/v1/kv/word", b"kept")
        before = host.address
        await host.kill(host.first)
        with pytest.raises(StartError, match="is unreachable: Connection refused"):
            await host.access.get("/v1/kv/word")
        await host.restart(host.first)
        assert (await host.access.get("/v1/kv/word"))[0]["Key"] == "word"
        assert host.address == before
        await host.restart_empty()
        with pytest.raises(StartError, match="404"):
            await host.access.get("/v1/kv/word")


async def test_it_listens_on_loopback_only_and_answers_dns(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path) as host:
        listening = psutil.Process(host.first.pid).net_connections(kind="inet")
        local = {connection.laddr.ip for connection in listening if connection.status == psutil.CONN_LISTEN}
        assert local == {"127.0.0.1"}
        service = {"Name": "fleet", "Tags": ["decode"], "Port": 7}
        await host.access.put("/v1/agent/service/register", service)
        assert await dns_counts(host.first, "decode.fleet.service.consul") == (0, 1)
        assert await dns_counts(host.first, "prefill.fleet.service.consul") == (NO_SUCH_NAME, 0)
        assert [entry["Service"]["Port"] for entry in await host.services("fleet")] == [7]


async def test_three_servers_lose_their_leader_and_find_another(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_servers(consul_binary, tmp_path) as host:
        first = await host.leader()
        await host.access.put("/v1/kv/word", b"kept")
        await host.kill(first)
        await host.wait_leader()
        second = await host.leader()
        assert second is not first
        await host.kill(second)
        await host.wait_leaderless()
        (left,) = (agent for agent in host.agents if agent.runs)
        with pytest.raises(StartError, match=r"has no leader \(500"):
            await left.access.put("/v1/kv/other", b"lost", timeout_s=20)
        await host.restart(first, second)
        await host.wait_leader()
        assert await left.access.get("/v1/kv/word")


async def test_a_paused_agent_is_silent_until_it_goes_on(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path) as host:
        await host.pause(host.first)
        assert not await host.first.leader()
        host.resume(host.first)
        await host.wait_leader()


async def test_an_agent_with_certificates_refuses_clients_without_one(consul_binary: Path, tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    issue_all(certs)
    tls = Tls.in_directory(certs, "consul")
    async with consul_agent(consul_binary, tmp_path, tls=tls, client=client_tls(certs)) as host:
        assert await host.access.get("/v1/status/leader")
        url = host.access.url
        with pytest.raises(StartError, match="its certificate is not trusted"):
            await ConsulAccess(address=url).get("/v1/status/leader")
        with pytest.raises(StartError, match=r"is unreachable|no valid response"):
            await ConsulAccess(address=url, ca=tls.ca).get("/v1/status/leader")
        with pytest.raises(StartError, match="400"):
            await ConsulAccess(address=host.address).get("/v1/status/leader")


async def test_why_it_does_not_start_is_one_sentence(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path / "first") as host:
        second = ConsulAgent(consul_binary, tmp_path / "second", AgentSpec(name="second", in_memory=True))
        second.ports = host.first.ports
        await second.start(tmp_path)
        with pytest.raises(StartError, match=r"^second did not start: .*address already in use"):
            await second.wait_ready()
        await second.stop()
    for program in (Path("/bin/true"), tmp_path / "nothing"):
        with pytest.raises(StartError, match=r"is not Consul|cannot be run"):
            await ConsulAgent(program, tmp_path).start(tmp_path)


async def test_an_agent_ends_with_its_parent(consul_binary: Path, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from tandem.local_cluster.consul_agent import *\n"
        "async def main():\n"
        " agent = ConsulAgent(Path(sys.argv[1]), Path(sys.argv[2]), AgentSpec(in_memory=True))\n"
        " await agent.start(Path(sys.argv[2])); await agent.wait_ready(); print(agent.pid, flush=True)\n"
        " await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    starter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(consul_binary), str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert starter.stdout is not None
    agent = psutil.Process(int(await starter.stdout.readline()))
    os.kill(starter.pid, signal.SIGKILL)
    await starter.wait()

    async def left() -> bool:
        return agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE

    await assert_eventually(left, lambda found: not found, within_s=10, what="the end of the agent")


async def test_a_token_is_shown_to_the_agent_only(consul_binary: Path, tmp_path: Path) -> None:
    access = ConsulAccess(address="127.0.0.1:1", token="not-for-logs")
    assert "not-for-logs" not in repr(access)
    async with consul_agent(consul_binary, tmp_path) as host:
        configuration = json.loads((tmp_path / "consul.json").read_text())
        assert configuration["client_addr"] == "127.0.0.1"
        assert (tmp_path / "consul.json").stat().st_mode & 0o077 == 0
        assert host.first.data.stat().st_mode & 0o077 == 0
