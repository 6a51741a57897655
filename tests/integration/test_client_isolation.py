"""A well-behaved client beside one that asks for too much: all of its requests are answered, and in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import hpack
import httpx
import psutil
import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.edge_host import client_of, detokenize, edge, stub_frontend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

ALICE, BOB = "sk-alice-0123456789abcdef", "sk-bob-0123456789abcdef"
ATTACK_S = 6.0
PERIOD_S = 0.2
BUSY_MACHINE_S = 1.5
"""Added to three times the quiet latency: on a shared machine the attacker takes processor time of the client too."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHAT = {"model": "tandem-demo", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}


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


async def assert_isolated(url: str, attack: Callable[[], Awaitable[None]], after_s: float = 0.5) -> None:
    """Every request of bob is answered while alice attacks, within three times the quiet latency and an allowance.

    Bob begins `after_s` after alice.
    """
    client = Client(url, BOB)
    try:
        quiet_s = await client.p99_s(2)
        attacking = asyncio.ensure_future(attack())
        try:
            await asyncio.sleep(after_s)
            beside_s = await client.p99_s(ATTACK_S)
        finally:
            attacking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attacking
    finally:
        await client.close()
    assert set(client.outcomes) == {"200"}, client.outcomes
    assert beside_s <= 3 * quiet_s + BUSY_MACHINE_S, f"p99 {beside_s:.2f} s, quiet {quiet_s:.2f} s"


def post(key: str, body: bytes, path: str = "/v1/chat/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def long_chat(**fields: Any) -> bytes:
    return json.dumps({**CHAT, "max_tokens": 1_500, "ignore_eos": True, **fields}).encode()


async def keep_sending(url: str, request: bytes, connections: int) -> None:
    """Send a request over each of so many connections, again when it has been answered, until cancelled.

    Reads bytes only: to parse the streams would take the processor time of the client beside it.
    """
    host, port = url.removeprefix("http://").split(":")

    async def one() -> None:
        while True:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(request)
                head = await reader.read(65_536)
                statuses[head[9:12].decode()] += 1
                while head and not head.startswith(b"HTTP/1.1 4"):
                    head = await reader.read(65_536)
                    if head.endswith(b"0\r\n\r\n"):
                        break
            finally:
                writer.transport.abort()
            if not head.startswith(b"HTTP/1.1 400"):
                await asyncio.sleep(1)  # as Retry-After says, and after a whole stream

    statuses = Counter[str]()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(one())
    finally:
        await asyncio.sleep(0.1)  # the aborted transports close in the next turn of the loop
        assert set(statuses) <= {"200", "400", "413", "429"}, statuses


async def test_requests_of_128_choices(keyed: str) -> None:
    await assert_isolated(keyed, lambda: keep_sending(keyed, post(ALICE, long_chat(n=128)), 2))


async def test_300_requests_at_once(keyed: str) -> None:
    await assert_isolated(keyed, lambda: keep_sending(keyed, post(ALICE, long_chat()), 300))


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(b'{"role":"user","content":"a"},' * 34_000 + b'{"role":"user","content":"a"}', id="objects"),
        pytest.param(b"0," * 500_000 + b"0", id="numbers"),
        pytest.param(b'{"role":"user","content":"' + b"a, " * 300_000 + b'"}', id="text"),
    ],
)
async def test_bodies_of_a_megabyte(keyed: str, messages: bytes) -> None:
    body = b'{"model":"tandem-demo","messages":[' + messages + b"]}"
    await assert_isolated(keyed, lambda: keep_sending(keyed, post(ALICE, body), 8))


async def flood(address: str, once: Callable[[asyncio.StreamWriter], Awaitable[None]], connections: int) -> None:
    """Connect so many times at once, let `once` send until the peer closes, and again, until cancelled."""
    host, port = address.removeprefix("http://").split(":")

    async def one() -> None:
        while True:
            _, writer = await asyncio.open_connection(host, int(port))
            try:
                with contextlib.suppress(OSError):
                    await once(writer)
            finally:
                writer.transport.abort()
            await asyncio.sleep(0.05)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(one())
    finally:
        await asyncio.sleep(0.1)


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    """A header block that never ends."""
    frame = 16_384
    writer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\1\0\0\0\0\1")
    continuation = frame.to_bytes(3, "big") + b"\x09\0\0\0\0\1" + b"\x10\x7f\x81\x7f" + b"a" * (frame - 4)
    while True:
        writer.write(continuation)
        await writer.drain()


async def test_headers_without_an_end_at_a_frontend(keyed: str, cluster: LocalCluster) -> None:
    frontend = psutil.Process(cluster.frontends[0].pid)
    before = frontend.memory_info().rss
    await assert_isolated(keyed, lambda: flood(cluster.frontends[0].address, endless_headers, 4))
    assert frontend.memory_info().rss - before < 64 * 2**20


async def whole_requests_that_are_reset(writer: asyncio.StreamWriter, open_count: int) -> None:
    """Complete requests, of which the latest `open_count` are open and the others are cancelled."""
    encoder, body = hpack.Encoder(), long_chat()
    headers = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": "/v1/chat/completions"}
    headers |= {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
    writer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0")
    for stream in range(1, 2**31, 2):
        block, name = encoder.encode(list(headers.items())), stream.to_bytes(4)
        writer.write(len(block).to_bytes(3) + b"\1\4" + name + block)
        writer.write(len(body).to_bytes(3) + b"\0\1" + name + body)
        if stream > 2 * open_count:
            writer.write(b"\0\0\4\3\0" + (stream - 2 * open_count).to_bytes(4) + b"\0\0\0\x08")
        await writer.drain()
        # With none open as fast as possible, otherwise each stays open for 20 ms.
        await asyncio.sleep(0.02 / open_count if open_count else 0)


@pytest.mark.parametrize(("connections", "open_count"), [(1, 0), (4, 0), (1, 50)])
async def test_whole_requests_that_are_reset(keyed: str, connections: int, open_count: int) -> None:
    attack = partial(whole_requests_that_are_reset, open_count=open_count)
    # The edge lets the requests of one second through at once.
    await assert_isolated(keyed, lambda: flood(keyed, attack, connections), after_s=2.5)


async def unread_streams(url: str, count: int) -> None:
    """Hold so many streams and read none of them, until cancelled."""
    host, port = url.removeprefix("http://").split(":")
    request = post(ALICE, long_chat(logprobs=True, top_logprobs=20))
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            held.setblocking(False)
            await asyncio.get_running_loop().sock_connect(held, (host, int(port)))
            await asyncio.get_running_loop().sock_sendall(held, request)
        await asyncio.Event().wait()


async def test_streams_that_are_not_read(keyed: str, cluster: LocalCluster) -> None:
    frontend = psutil.Process(cluster.frontends[0].pid)
    before = frontend.memory_info().rss
    await assert_isolated(keyed, lambda: unread_streams(keyed, 100))
    assert frontend.memory_info().rss - before < 128 * 2**20


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
    assert response.status_code == 429, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert "tenant_share" in error["message"]
