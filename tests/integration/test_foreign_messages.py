"""Foreign traffic at every port of a real pair: no stream breaks, no worker stops, and what was dropped is counted.

One pair of SGLang engines. The last tests end a receiving thread on purpose, by a hook of the test's own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import time
from collections.abc import AsyncIterator
from functools import partial
from operator import lt
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
import zmq

from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support import receiver_faults
from tests.integration.support.bootstrap import bootstrap_url
from tests.integration.support.calls import generate, request_of
from tests.integration.support.foreign_messages import (
    Listener,
    messages,
    payloads,
    send_messages,
    send_raw,
    sockets,
    speaks_zmq,
)
from tests.integration.support.scraped import Wanted, values

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),
]

PROMPT = [20 + number % 1_000 for number in range(64)]
ANSWERED_WITHIN_S = 10.0
"""A hand-over that nothing receives takes 30 s."""
LATE_S = 1.0
"""More for a machine without an idle core."""
GROWTH_BYTES_MAX = 256 * 2**20
DROPPED = "tandem.engine.messages.dropped"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as environment:
        receiver_faults.plug_in(logs, environment)
        spec = ClusterSpec(model=DEMO_MODEL, log_directory=logs, metrics=True, worker_flags={"dtype": "float32"})
        async with LocalCluster(spec) as cluster:
            yield cluster


async def answer(cluster: LocalCluster, tokens: int = 16) -> list[int]:
    """The tokens of one request; it must move KV between the engines."""
    request = request_of(token_ids=PROMPT, max_tokens=tokens, ignore_eos=True)
    stream = await generate(cluster, request)
    assert stream.finish.timings.kv_transfer_bytes > 0
    return stream.token_ids


async def dropped(process: ClusterProcess) -> float:
    return sum(await values([process], Wanted(DROPPED)))


def handover_port(worker: ClusterProcess) -> Listener:
    """The port at which its engine's receiving thread listens: the only one that speaks ZMQ."""
    found = [listener for listener in sockets(worker.pid) if listener.pid != worker.pid and speaks_zmq(listener)]
    assert len(found) == 1, found
    return found[0]


async def test_every_socket_listens_on_loopback_only(pair: LocalCluster) -> None:
    for process in pair.processes:
        found = sockets(process.pid)
        assert found, process.name
        for listener in found:
            address = ipaddress.ip_address(listener.host.removeprefix("::ffff:"))
            assert address.is_loopback, (process.name, listener)


async def test_streams_outlive_garbage_at_every_port(pair: LocalCluster) -> None:
    expected, long = await answer(pair), await answer(pair, 256)
    listeners = {process.name: sockets(process.pid) for process in pair.processes}
    held = {
        pid: psutil.Process(pid).memory_info().rss for found in listeners.values() for pid in {x.pid for x in found}
    }
    starts = {process.name: process.pid for process in pair.processes}
    zmq_ports = [handover_port(worker) for worker in pair.workers]
    before = {worker.name: await dropped(worker) for worker in pair.workers}

    running = [asyncio.create_task(answer(pair, 256)) for _ in range(4)]
    for payload in payloads().values():
        await asyncio.gather(*(send_raw(at, payload) for found in listeners.values() for at in found))
    for listener in zmq_ports:
        await asyncio.to_thread(send_messages, listener)
    assert [tokens == long for tokens in await asyncio.gather(*running)] == [True] * 4

    async with asyncio.timeout(ANSWERED_WITHIN_S):
        assert await answer(pair) == expected
    for worker in pair.workers:
        assert await calls.is_serving(worker.address)
        # All of them but those that are well-formed and name no room.
        await assert_eventually(
            partial(dropped, worker),
            partial(lt, before[worker.name] + 0.8 * len(list(messages()))),
            within_s=10,
            what=f"messages that {worker.name} dropped",
        )
    assert {process.name: process.pid for process in pair.processes} == starts
    assert all(process.runs for process in pair.processes)
    for pid, bytes_before in held.items():
        assert psutil.Process(pid).memory_info().rss - bytes_before < GROWTH_BYTES_MAX, pid


async def test_large_frames_do_not_fill_the_memory(pair: LocalCluster) -> None:
    for worker in pair.workers:
        listener = handover_port(worker)
        before = psutil.Process(listener.pid).memory_info().rss
        with zmq.Context() as context:
            for _ in range(8):
                with context.socket(zmq.PUSH) as push:
                    push.setsockopt(zmq.LINGER, 500)
                    push.connect(f"tcp://{listener.host}:{listener.port}")
                    push.send(bytes(64 * 2**20))
                    await asyncio.sleep(0.1)
        assert psutil.Process(listener.pid).memory_info().rss - before < GROWTH_BYTES_MAX
    async with asyncio.timeout(ANSWERED_WITHIN_S):
        await answer(pair)


async def test_the_bootstrap_server_takes_its_own_engine_only(pair: LocalCluster) -> None:
    url, prefill = await bootstrap_url(pair.registry.address), pair.process("prefill-0")
    before = await dropped(prefill)
    where = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0, "target_pp_rank": 0}
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        route = (await client.get("/route", params=where)).json()
        forged: dict[str, Any] = {
            f"{rank}_{what}": 0 for rank in ("attn_tp", "attn_cp", "attn_dp", "system_dp") for what in ("rank",)
        }
        forged |= {f"{rank}_size": 1 for rank in ("attn_tp", "attn_cp", "attn_dp", "system_dp", "pp")}
        forged |= {"pp_rank": 0, "rank_ip": "127.0.0.9", "rank_port": 9, "page_size": 1, "kv_cache_dtype": "auto"}
        bodies: tuple[Any, ...] = (
            forged,
            {**forged, "tandem_registration_key": "guess"},
            {"tandem_registration_key": 7},
            [],
            "x",
            None,
        )
        for body in bodies:
            assert (await client.put("/route", json=body)).status_code == 403
        assert (await client.put("/route", content=b"\xff{" * 100)).status_code == 403
        assert (await client.post("/register_dp_rank", json={"bootstrap_room": 1, "dp_rank": 5})).status_code == 403
        assert (await client.get("/route", params=dict.fromkeys(where, "x"))).status_code == 400
        bodies = ([], {}, {"bootstrap_rooms": ["x"]}, {"bootstrap_rooms": 5})
        for body in bodies:
            assert (await client.post("/query_dp_ranks", json=body)).status_code == 400
        assert (await client.post("/query_dp_ranks", content=b"[" * 100_000)).status_code == 400
        assert (await client.get("/route", params=where)).json() == route
    await assert_eventually(lambda: dropped(prefill), lambda count: count - before >= 14, within_s=5, what="requests")
    async with asyncio.timeout(ANSWERED_WITHIN_S):
        await answer(pair)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_whose_receiving_thread_ends_starts_again(pair: LocalCluster, role: str) -> None:
    worker = pair.process(f"{role}-0")
    expected = await answer(pair)
    listener = handover_port(worker)
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(f"tcp://{listener.host}:{listener.port}")
        push.send_multipart(receiver_faults.MESSAGE[role])
        began_s = time.monotonic()
        while await serves(worker):
            assert time.monotonic() - began_s < 2.0 + LATE_S, "the worker still says that it serves"
            await asyncio.sleep(0.02)
    async with asyncio.timeout(30):
        assert await worker.wait_ended() == 1
    assert "the thread that receives the messages of the KV hand-over has ended" in (worker.last_words() or "")
    await pair.restart(worker.name)
    assert await serves(worker)
    await assert_eventually(lambda: usable(pair), within_s=30, what="the frontend's view of the new start")
    async with asyncio.timeout(2 * ANSWERED_WITHIN_S):
        assert await answer(pair) == expected


async def serves(worker: ClusterProcess) -> bool:
    try:
        return await calls.is_serving(worker.address)
    except TandemError:
        return False


async def usable(cluster: LocalCluster) -> bool:
    return len(await calls.list_workers(cluster.registry.address)) == 2
