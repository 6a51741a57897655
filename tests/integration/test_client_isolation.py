"""A well-behaved client beside one that asks for too much: all of its requests are answered, and in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.attacks import ATTACKS, CHAT, PREFACE, Target, attacking, keep_sending, long_chat, post
from tests.integration.support.edge_host import client_of, detokenize, edge, stub_frontend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

ALICE, BOB = "sk-alice-0123456789abcdef", "sk-bob-0123456789abcdef"
ATTACK_S = 6.0
PERIOD_S = 0.2
BUSY_MACHINE_S = 1.5
"""Added to three times the quiet latency: on a shared machine others take processor time too. `python -m
benchmarks.client_isolation` measures without it."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A simulated pair and a frontend."""
    logs = tmp_path_factory.mktemp("cluster")
    async with running(logs, engine="simulated", worker_flags=SIMULATED) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keyed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The URL of an edge with two keys before it."""
    logs = tmp_path_factory.mktemp("isolation")
    (logs / "keys").write_text(f"alice: {ALICE}\nbob: {BOB}\n")
    (logs / "keys").chmod(0o600)
    addresses = ",".join(frontend.address for frontend in cluster.frontends)
    async with edge(logs, addresses, api_keys=logs / "keys", drain_timeout_s=1) as process:
        yield f"http://{process.address}"


class Client:
    """Sends a short chat every `PERIOD_S`, without waiting for the one before."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=20)
        self.outcomes: dict[str, int] = {}

    async def p99_s(self, seconds: float) -> float:
        """The latency of the worst request in a hundred, over so long."""
        end_s, tasks = time.monotonic() + seconds, list[asyncio.Task[float]]()
        while time.monotonic() < end_s:
            tasks.append(asyncio.create_task(self._one()))
            await asyncio.sleep(PERIOD_S)
        latencies = sorted(await asyncio.gather(*tasks))
        return latencies[int(0.99 * (len(latencies) - 1))]

    async def _one(self) -> float:
        begin_s = time.monotonic()
        try:
            response = await self._http.post("/v1/chat/completions", json=CHAT)
            outcome = str(response.status_code) if "error" not in response.text else response.text
        except httpx.HTTPError as problem:
            outcome = repr(problem)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        return time.monotonic() - begin_s

    async def close(self) -> None:
        await self._http.aclose()


async def assert_isolated(url: str, attack: str, frontend: str, after_s: float = 0.5) -> None:
    """Every request of bob is answered while alice attacks, within three times the quiet latency and an allowance.

    Bob begins `after_s` after alice.
    """
    client = Client(url, BOB)
    try:
        quiet_s = await client.p99_s(2)
        async with attacking(attack, Target(url, frontend, ALICE)):
            await asyncio.sleep(after_s)
            beside_s = await client.p99_s(ATTACK_S)
    finally:
        await client.close()
    assert set(client.outcomes) == {"200"}, client.outcomes
    assert beside_s <= 3 * quiet_s + BUSY_MACHINE_S, f"p99 {beside_s:.2f} s, quiet {quiet_s:.2f} s"


BESIDE = sorted(ATTACKS.keys() - {"endless-headers", "unread-streams", "idle-connections"})
"""The others have tests of their own."""


@pytest.mark.parametrize("attack", BESIDE)
async def test_an_attack_through_the_edge(keyed: str, cluster: LocalCluster, attack: str) -> None:
    await assert_isolated(keyed, attack, cluster.frontends[0].address)


@pytest.mark.parametrize(("attack", "mib"), [("endless-headers", 64), ("unread-streams", 128)])
async def test_an_attack_on_the_memory_of_a_frontend(keyed: str, cluster: LocalCluster, attack: str, mib: int) -> None:
    frontend = psutil.Process(cluster.frontends[0].pid)
    before = frontend.memory_info().rss
    await assert_isolated(keyed, attack, cluster.frontends[0].address)
    assert frontend.memory_info().rss - before < mib * 2**20


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"P", id="a-byte"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", id="a-request"),
        pytest.param(PREFACE + b"\0\0\0\4\0\0\0\0\0", id="http2"),
    ],
)
async def test_idle_connections_do_not_keep_the_edge_full(tmp_path: Path, sent: bytes) -> None:
    limits = {"connections_max": 100, "first_bytes_timeout_s": 2, "headers_timeout_s": 2}
    async with stub_frontend() as (_, address), edge(tmp_path, address, **limits) as process:
        host, port = process.address.split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(120)]
        for _, writer in held:
            writer.write(sent)

        async def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                async with client_of(process) as client:
                    return (await detokenize(client)).status_code == 200
            return False

        assert not await answers(), "the attack had no effect"
        await assert_eventually(answers, bool, within_s=8, what="an answer beside silent connections")
        async with asyncio.timeout(5):
            for reader, _ in held:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
        for _, writer in held:
            writer.transport.abort()
        await asyncio.sleep(0.1)


async def test_a_refusal_names_the_limit_and_when_to_retry(keyed: str) -> None:
    await asyncio.sleep(1.5)  # what a test before has cancelled still counts for alice
    async with httpx.AsyncClient(base_url=keyed, headers={"authorization": f"Bearer {ALICE}"}, timeout=60) as http:
        filling = asyncio.ensure_future(keep_sending(keyed, post(ALICE, long_chat(n=128)), 1))
        try:
            await asyncio.sleep(1)
            response = await http.post("/v1/chat/completions", json={**CHAT, "n": 128})
        finally:
            filling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await filling
            await asyncio.sleep(0.1)  # the aborted transports close in the next turn of the loop
    assert response.status_code == 429, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert "tenant_share" in error["message"]
