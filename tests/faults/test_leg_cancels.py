"""Requests no client waits for any more, in every phase of their legs and by every way a request is given up.

The phase is held while the request is given up, so both engines must let it go where it stands: within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fault_cluster import DEMO_MODEL
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S, assert_idle, fired, inject
from tests.faults.support.leg_report import LINES

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

HOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bootstrapping": ("prefill", {"point": "bootstrap", "kind": "hang"}),
    # Not a hang: an engine that hangs in a step can let nothing go before that step ends.
    "prefilling": ("prefill", {"point": "prefill_chunk", "kind": "delay", "delay_s": 0.25}),
    "transferring": ("prefill", {"point": "transfer_middle", "kind": "hang"}),
    "decoding": ("decode", {"point": "decode_step", "kind": "delay", "delay_s": 0.1}),
}
PROMPT = [20 + number % 1_000 for number in range(640)]
DEADLINE_S = 1.2


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("cancels")
    engine = {"chunked_prefill_tokens": 64, "prefix_cache": False}
    flags = {
        role: {"engine-extra": json.dumps({**engine, "control_file": str(logs / f"{role}.rules")})}
        for role in ("prefill", "decode")
    }
    spec = ClusterSpec(model=DEMO_MODEL, log_directory=logs, engine="simulated", edge=True, role_flags=flags)
    async with LocalCluster(spec) as cluster:
        yield cluster


def rules(cluster: LocalCluster, role: str) -> Path:
    return cluster.log_directory / f"{role}.rules"


def request() -> dict[str, Any]:
    return {
        "token_ids": {"ids": PROMPT},
        "sampling": {"temperature": 0.0},
        "stopping": {"max_tokens": 400, "ignore_eos": True},
    }


async def both_have_it(cluster: LocalCluster, phase: str, before: int) -> None:
    """Return when the request is held in the phase, by proof of the fault, and both workers have its legs."""
    role, rule = HOLDS[phase]
    least = 4 if rule["kind"] == "delay" else 1
    await assert_eventually(
        lambda: len(fired(rules(cluster, role))) - before, lambda count: count >= least, what=f"a hold in {phase}"
    )

    async def legs() -> list[int]:
        return [(await calls.worker_load(worker.address)).open_legs for worker in cluster.workers]

    # Prefill's leg is over when decode computes.
    wanted = 1 if phase == "decoding" else 2
    await assert_eventually(legs, lambda found: sum(found) >= wanted, what="open legs")


async def stream(cluster: LocalCluster, started: asyncio.Future[str], timeout_s: float | None) -> int:
    """The reason of its finish."""
    events = calls.generate(cluster.frontend.address, pb.GenerateRequest(**request()), timeout_s)
    async with contextlib.aclosing(events):
        async for event in events:
            if event.HasField("accepted"):
                started.set_result(event.accepted.request_id)
            if event.HasField("finish"):
                return event.finish.reason
    raise AssertionError("no ending")


async def by_the_client(cluster: LocalCluster, phase: str, before: int) -> float:
    task = asyncio.create_task(stream(cluster, asyncio.get_running_loop().create_future(), None))
    await both_have_it(cluster, phase, before)
    given_up_s = now_s()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled(), "void: it was over before it was given up"
    return given_up_s


async def by_the_deadline(cluster: LocalCluster, phase: str, before: int) -> float:
    end_s = now_s() + DEADLINE_S
    task = asyncio.create_task(stream(cluster, asyncio.get_running_loop().create_future(), DEADLINE_S))
    await both_have_it(cluster, phase, before)
    assert now_s() < end_s, "void: the deadline passed before it was held"
    with pytest.raises(TandemError) as failed:
        await task
    assert failed.value.reason == "DEADLINE_EXCEEDED"
    return end_s


async def by_an_abort(cluster: LocalCluster, phase: str, before: int) -> float:
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(stream(cluster, started, None))
    await both_have_it(cluster, phase, before)
    # One worker only: the other leg must follow.
    worker = cluster.process("decode-0")
    async with open_channel(worker.address) as channel:
        stub: Any = WorkerServiceStub(channel)
        epoch = (await stub.GetCapabilities(worker_pb.GetCapabilitiesRequest())).worker.epoch
        given_up_s = now_s()
        response = await stub.Abort(worker_pb.AbortRequest(worker_epoch=epoch, request_id=await started))
    assert response.aborted_legs == 1
    assert await task == generation_pb2.FINISH_REASON_ABORTED
    return given_up_s


async def by_leaving_the_edge(cluster: LocalCluster, phase: str, before: int) -> float:
    assert cluster.edge is not None

    assert cluster.edge is not None
    address = cluster.edge.address

    async def read() -> None:
        async with (
            httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
            client.stream("POST", "/v1/generate", json=request()) as response,
        ):
            assert response.status_code == 200, await response.aread()
            async for _ in response.aiter_lines():
                pass

    task = asyncio.create_task(read())
    await both_have_it(cluster, phase, before)
    assert not task.done(), task.exception()
    given_up_s = now_s()
    task.cancel()
    await asyncio.wait({task})
    return given_up_s


@pytest.mark.parametrize("phase", HOLDS)
@pytest.mark.parametrize(
    "give_up",
    [by_the_client, by_the_deadline, by_an_abort, by_leaving_the_edge],
    ids=["client", "deadline", "abort", "edge"],
)
async def test_a_request_that_is_given_up_leaves_both_engines_within_a_second(
    cluster: LocalCluster, phase: str, give_up: Any
) -> None:
    role, rule = HOLDS[phase]
    await assert_idle(cluster.workers)
    before = len(fired(rules(cluster, role)))
    inject(rules(cluster, role), rule)
    try:
        given_up_s = await give_up(cluster, phase, before)
        # The hold is still there: it is the engines that let go, and not the fault that ends.
        await assert_idle(cluster.workers)
        left_s = max(0.0, now_s() - given_up_s)
    finally:
        inject(rules(cluster, role))
    assert left_s < IDLE_WITHIN_S + BUSY_MACHINE_S
    way = give_up.__name__.replace("_", " ")
    LINES.append(f"given up {way}, {phase}: both engines idle after {left_s * 1e3:.0f} ms")
