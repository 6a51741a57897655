"""How an edge finds its frontends while it runs: through the registry, and through Consul's DNS; and what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from google.api.httpbody_pb2 import HttpBody
from tandem_edge.transcoding import HEALTH_SERVICE_NAME

from tandem.discovery.registration import Registration
from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.consul import ClusterConsul
from tandem.service import run_directory
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.consul_host import ConsulHost, consul_agent
from tests.integration.support.edge_host import StubFrontend, client_of, detokenize, edge, stub_frontend
from tests.integration.test_edge_resilience import CLIENTS, Load, took_part, two_frontends

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

LEASE_S = 1.0
FOUND_DEAD_S = 3.0
"""By then Envoy has missed two health checks of a frontend, one in each second."""
NAME = "frontend.tandem.service.consul"


@asynccontextmanager
async def registry_process(logs: Path, port: int = 0) -> AsyncIterator[ClusterProcess]:
    """A registry that can be killed and started again at its port."""
    process = ClusterProcess("registry", "registry", {"port": str(port), "lease-ttl-s": str(LEASE_S)}, logs)
    try:
        await started(process)
        yield process
    finally:
        await process.stop()


async def started(process: ClusterProcess) -> None:
    run = run_directory.make()
    await process.start(run)
    await process.wait_ready()
    process.flags["port"] = process.address.rpartition(":")[2]
    run.rmdir()


@asynccontextmanager
async def listed(registry: str, address: str) -> AsyncIterator[Registration]:
    """A frontend's entry in the registry, kept; its id is its address."""
    name = address.replace(":", "-")
    member = Frontend(frontend_id=name, epoch=time.time_ns() // 1_000_000, address=address, model="tiny")
    registration = Registration([registry], member)
    await registration.start()
    try:
        await asyncio.wait_for(registration.wait_registered(), 5)
        yield registration
    finally:
        await registration.close()


async def answering(client: httpx.AsyncClient, count: int = 12) -> set[str]:
    """Addresses of the frontends that answered a few requests; nothing else was answered."""
    found = set()
    for _ in range(count):
        response = await detokenize(client)
        assert response.status_code == 200, response.text
        found.add(response.json()["text"])
    return found


async def until_answering(client: httpx.AsyncClient, *addresses: str, within_s: float = 5) -> None:
    async def found() -> set[str]:
        return await answering(client)

    what = f"answers of {addresses} only"
    await assert_eventually(found, lambda seen: seen == set(addresses), within_s=within_s, what=what)


async def test_frontends_of_a_registry_come_and_go_without_a_restart(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(registry_process(tmp_path))
        _, first = await stack.enter_async_context(stub_frontend())
        await stack.enter_async_context(listed(registry.address, first))
        process = await stack.enter_async_context(edge(tmp_path, registry=registry.address))
        client = await stack.enter_async_context(client_of(process))
        assert await answering(client) == {first}
        async with stub_frontend() as (_, second):
            async with listed(registry.address, second):
                await until_answering(client, first, second)
            await until_answering(client, first)


async def test_a_draining_frontend_finishes_its_streams_and_gets_no_new_request(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[HttpBody]:
        yield HttpBody(content_type="text/event-stream", data=b"data: 1\n\n")
        await go_on.wait()
        yield HttpBody(data=b"data: 2\n\n")

    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(registry_process(tmp_path))
        leaver, leaving = await stack.enter_async_context(stub_frontend())
        leaver.stream = slow
        registration = await stack.enter_async_context(listed(registry.address, leaving))
        process = await stack.enter_async_context(edge(tmp_path, registry=registry.address))
        client = await stack.enter_async_context(client_of(process))
        stream = await stack.enter_async_context(client.stream("POST", "/v1/generate", json={"prompt": "x"}))
        chunks = stream.aiter_text()
        assert await anext(chunks) == "data: 1\n\n"

        _, other = await stack.enter_async_context(stub_frontend())
        await stack.enter_async_context(listed(registry.address, other))
        await until_answering(client, leaving, other)
        # Its health still says that it serves: it is the registry that says otherwise.
        assert await registration.set_state(WorkerState.DRAINING)
        await until_answering(client, other)
        await registration.close()
        await until_answering(client, other)
        go_on.set()
        assert await anext(chunks) == "data: 2\n\n"


async def test_an_edge_serves_on_when_its_registry_is_killed_and_comes_back_empty(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(registry_process(tmp_path))
        addresses = []
        for _ in range(2):
            _, address = await stack.enter_async_context(stub_frontend())
            await stack.enter_async_context(listed(registry.address, address))
            addresses.append(address)
        process = await stack.enter_async_context(edge(tmp_path, registry=registry.address))
        client = await stack.enter_async_context(client_of(process))
        await until_answering(client, *addresses)

        registry.signal(signal.SIGKILL)
        assert await registry.wait_ended() == -signal.SIGKILL
        await assert_eventually(process.log.read_text, lambda text: "keeping 2 known frontends" in text, what="outage")
        async with until_it_ends(client) as outcomes:
            await asyncio.sleep(2 * LEASE_S)
            await started(registry)
            await assert_eventually(process.log.read_text, lambda text: text.count(": watching (") == 2, what="return")
            await asyncio.sleep(LEASE_S)
        assert set(outcomes) == {200}
        _, late = await stack.enter_async_context(stub_frontend())
        await stack.enter_async_context(listed(registry.address, late))
        await until_answering(client, *addresses, late)


@asynccontextmanager
async def until_it_ends(client: httpx.AsyncClient) -> AsyncIterator[list[int]]:
    """Requests one after the other while the block runs, and their statuses."""
    outcomes: list[int] = []

    async def ask() -> None:
        while True:
            outcomes.append((await detokenize(client)).status_code)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(ask())
    try:
        yield outcomes
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert len(outcomes) > 10


async def test_an_edge_starts_before_its_registry_and_is_not_healthy_until_there_are_frontends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with edge(tmp_path, registry=f"127.0.0.1:{port}") as process, client_of(process) as client:
        assert "no frontends discovered yet" in process.log.read_text()
        assert (await client.get("/healthz")).status_code == 503
        assert (await detokenize(client)).status_code == 503
        async with (
            registry_process(tmp_path, port) as registry,
            stub_frontend() as (_, address),
            listed(registry.address, address),
        ):
            await assert_eventually(lambda: client.get("/healthz"), lambda r: r.status_code == 200, what="health")
            assert await answering(client) == {address}


async def test_a_frontend_may_be_listed_by_its_name(tmp_path: Path) -> None:
    async with registry_process(tmp_path) as registry, stub_frontend() as (_, address):
        name = f"localhost:{address.rpartition(':')[2]}"
        async with (
            listed(registry.address, name),
            edge(tmp_path, registry=registry.address) as process,
            client_of(process) as client,
        ):
            assert await answering(client) == {address}


async def enter(consul: ConsulHost, address: str) -> None:
    """What the registry says to Consul of a frontend, as far as DNS needs it."""
    host, _, port = address.rpartition(":")
    check = {"GRPC": f"{address}/{HEALTH_SERVICE_NAME}", "Interval": "1s", "Timeout": "1s", "Status": "passing"}
    service = {
        "ID": address,
        "Name": "tandem",
        "Tags": ["frontend"],
        "Address": host,
        "Port": int(port),
        "Check": check,
    }
    await consul.access.put("/v1/agent/service/register", service)


async def leave(consul: ConsulHost, address: str) -> None:
    await consul.access.put(f"/v1/agent/service/deregister/{address}")


@asynccontextmanager
async def named_frontends(count: int) -> AsyncIterator[list[tuple[StubFrontend, str]]]:
    """Frontends at one port of different addresses: a name of DNS carries no port."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(stub_frontend("127.0.0.2"))]
        port = int(found[0][1].rpartition(":")[2])
        for number in range(1, count):
            found.append(await stack.enter_async_context(stub_frontend(f"127.0.0.{2 + number}", port)))
        yield found


async def test_frontends_of_consul_come_and_go_and_outlive_its_death(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path) as consul, named_frontends(5) as frontends:
        addresses = [address for _, address in frontends]
        await enter(consul, addresses[0])
        name = f"{NAME}:{addresses[0].rpartition(':')[2]}"
        async with (
            edge(tmp_path, name, dns_server=consul.dns, dns_refresh_s=0.3) as process,
            client_of(process) as client,
        ):
            assert await answering(client) == {addresses[0]}
            for address in addresses[1:]:
                await enter(consul, address)
            # More than the three that an answer over UDP would hold.
            await until_answering(client, *addresses)
            await leave(consul, addresses[4])
            await until_answering(client, *addresses[:4])
            await consul.kill(consul.first)
            async with until_it_ends(client) as outcomes:
                await asyncio.sleep(1)
            assert set(outcomes) == {200}
            # Drawn at random: a few requests need not reach each of them.
            await until_answering(client, *addresses[:4])


def requests_to(process: ClusterProcess, frontend: str, since_s: float) -> int:
    """How many requests that began since then the edge sent to a frontend."""
    lines = [line for line in process.log.read_text().splitlines() if f'"frontend":"{frontend}"' in line]
    times = [datetime.datetime.fromisoformat(json.loads(line)["time"]).timestamp() for line in lines]
    return sum(time_s >= since_s for time_s in times)


async def test_a_cluster_over_consul_serves_on_without_consul_and_without_a_registry(
    consul_binary: Path, tmp_path: Path
) -> None:
    consul = ClusterConsul(binary=consul_binary)
    spec = {"engine": "simulated", "edge": True, "frontends": 2, "consul": consul, "worker_flags": SIMULATED}
    async with running(tmp_path, **spec) as cluster:
        assert cluster.edge is not None
        assert cluster.consul is not None
        assert "frontends" not in cluster.edge.flags
        async with client_of(cluster.edge) as client:
            load = Load(client)
            async with load.running():
                for frontend in cluster.frontends:
                    await took_part(cluster, frontend.address)
                for process in (cluster.consul, cluster.registry):
                    process.kill()
                    await process.wait_ended()
                await load.more(CLIENTS * 5)
            assert load.wrong == []
            # No process is left that could report that this one is gone.
            victim = cluster.frontends[1]
            load.stopped = False
            async with load.running():
                victim.kill()
                await victim.wait_ended()
                killed_s = time.time()
                await asyncio.sleep(FOUND_DEAD_S)
                wrong_count = len(load.wrong)
                await load.more(CLIENTS * 10)
            assert wrong_count <= CLIENTS, load.wrong
            assert load.wrong[wrong_count:] == []
        await asyncio.sleep(0.3)  # Envoy writes its log every 0.2 s
        assert requests_to(cluster.edge, victim.address, killed_s + FOUND_DEAD_S) == 0
        assert requests_to(cluster.edge, cluster.frontend.address, killed_s + FOUND_DEAD_S) > CLIENTS


async def test_a_frontend_that_is_started_again_joins_under_an_edge_that_runs_on(tmp_path: Path) -> None:
    async with two_frontends(tmp_path) as (cluster, load):
        leaver = cluster.frontends[0]
        async with load.running():
            await took_part(cluster, leaver.address)
            assert await leaver.stop() == 0
            await load.more(CLIENTS * 2)
            begun_s = time.time()
            await cluster.restart(leaver.name)
            assert cluster.edge is not None
            edge_process = cluster.edge
            count = lambda: requests_to(edge_process, leaver.address, begun_s)  # noqa: E731
            await assert_eventually(
                count, lambda seen: seen > CLIENTS, within_s=10, what="requests to the one that is back"
            )
        assert load.wrong == []
