"""Engines that fail hand-overs or run out of memory, readers that do not read, dead frontends and registries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client import calls
from tandem.engine.simulated.kv_content import DAMAGES
from tandem.errors import ServiceError
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.demo_answers import demo_answers
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S, LegCluster, leg_cluster
from tests.faults.support.leg_report import report, results_of
from tests.faults.support.leg_trace import FLOOR, one_ending_each, under_load
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape, SteadyLoad, steady_load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

SLOW_READER_TOKENS = 800


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("shortages")) as cluster:
        yield cluster


@pytest.mark.parametrize("point", ["bootstrap", "transfer_begin", "transfer_middle", "transfer_end"])
async def test_every_third_hand_over_of_one_worker_fails(cluster: LegCluster, point: str) -> None:
    async with under_load(cluster, f"every third {point} of prefill-0 fails") as trace:
        before = len(cluster.fired("prefill-0"))
        trace.fault_s = now_s()
        cluster.inject("prefill-0", {"point": point, "kind": "fail", "every": 3})
        await trace.answered(40)
        passes = [fault["passed"] for fault in cluster.fired("prefill-0")[before:]]
        assert len(passes) > 1, "void: no hand-over failed"
        assert passes == list(range(3, 3 * len(passes) + 1, 3)), "not every third one"
    again = trace.load.history.where(lambda asked: (asked.last_attempt or 1) > 1)
    verdicts.is_large_enough(again, 1, "what was begun again")


async def test_damaged_kv_reaches_no_client(cluster: LegCluster) -> None:
    """Each kind of damage at every tenth hand-over: its stream has the tokens of an undisturbed run."""
    rules = [
        {"point": "kv_arrived", "kind": kind, "nth": 2 * number, "every": 10} for number, kind in enumerate(DAMAGES, 1)
    ]
    async with under_load(cluster, "KV that decode-0 receives is damaged") as trace:
        before = len(cluster.fired("decode-0"))
        trace.fault_s = now_s()
        cluster.inject("decode-0", *rules)
        await assert_eventually(
            lambda: {fault["kind"] for fault in cluster.fired("decode-0")[before:]} >= set(DAMAGES),
            within_s=60,
            what="each kind of damage",
        )
        await trace.answered(20)
    again = trace.load.history.where(lambda asked: (asked.last_attempt or 1) > 1)
    verdicts.is_large_enough(again, len(DAMAGES), "what was begun again")


async def test_a_decode_worker_without_memory_gives_it_back(cluster: LegCluster) -> None:
    async with under_load(cluster, "KV memory of decode-0 exhausted for a second") as trace:
        await trace.hold("decode-0", "decoding")
        before = len(cluster.fired("decode-0"))
        trace.fault_s = now_s()
        cluster.inject("decode-0", {"point": "decode_step", "kind": "exhaust", "nth": 1, "delay_s": 1.0})
        await assert_eventually(lambda: len(cluster.fired("decode-0")) > before, what="exhausted memory")
        await trace.answered(20)


async def test_a_client_that_does_not_read_holds_up_no_other(cluster: LegCluster) -> None:
    prompt = tuple(range(20, 40))
    async with under_load(cluster, "a reader that does not read") as trace:
        async with open_channel(cluster.frontends[0].address) as channel:
            stub: Any = InferenceServiceStub(channel)
            call = stub.Generate(_greedy(prompt, SLOW_READER_TOKENS), timeout=60)
            tokens: list[int] = []
            while not tokens:
                tokens += (await call.read()).chunk.token_ids
            trace.fault_s = now_s()
            await trace.answered(30)
            while (event := await call.read()) is not grpc.aio.EOF:
                tokens += event.chunk.token_ids
        assert tokens == demo_answers(prompt, SLOW_READER_TOKENS)
    attempts = {asked.last_attempt for asked in trace.load.history.asked}
    assert attempts == {1}, "a request was sent elsewhere"


async def test_a_killed_registry_is_nothing(cluster: LegCluster) -> None:
    async with under_load(cluster, "kill of the registry") as trace:
        await trace.hold("decode-0", "decoding")
        trace.fault_s = await kill(cluster.registries[0])
        await trace.answered(30)
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"


async def test_a_killed_frontend_leaves_no_leg(cluster: LegCluster) -> None:
    killed, other = cluster.frontends
    shape = Shape(rate_per_s=8, long_every=1, long_tokens=400, deadline_s=30)
    async with cluster.views() as views:
        await cluster.restore(views)
        async with steady_load([killed.address], shape) as load, steady_load([other.address]) as rest:
            await load.wait_running(4)
            await rest.wait_ended(FLOOR)
            killed_s = await kill(killed)
            # No more requests meet it: what counts is what it had.
            left = asyncio.create_task(_legs_end(cluster, rest))
            await rest.wait_ended(FLOOR)
            legs_s = await left
        await cluster.restore(views)
    await cluster.assert_idle()
    had = load.history.running_at(killed_s)
    verdicts.is_large_enough(had, 4, "what the frontend had")
    assert all(isinstance(asked.failure, ServiceError) for asked in had.asked), had.lines()
    one_ending_each(load.history)
    late = had.where(lambda asked: (asked.end_s or 0.0) - killed_s > IDLE_WITHIN_S + BUSY_MACHINE_S)
    assert not len(late), f"clients with a late response:\n{late.lines()}"
    verdicts.tokens_are_exact(had, demo_answers)
    verdicts.none_failed(rest.history)
    report("kill of a frontend: its own clients", results_of(load.history.begun(0, killed_s), killed_s, legs_s))
    report("kill of a frontend: those of the other one", results_of(rest.history, killed_s))


async def _legs_end(cluster: LegCluster, rest: SteadyLoad) -> float:
    """Return when the workers have no more legs than the other frontend has requests; how long it took."""
    begin_s = now_s()

    async def too_many() -> int:
        loads = [await calls.worker_load(worker.address) for worker in cluster.of_role("decode")]
        open_ones = rest.history.where(lambda asked: asked.end_s is None)
        return sum(load.open_legs for load in loads) - len(open_ones)

    within_s = IDLE_WITHIN_S + BUSY_MACHINE_S
    await assert_eventually(too_many, lambda count: count <= 0, within_s=within_s, what="no leg of a dead frontend")
    return now_s() - begin_s


def _greedy(prompt: tuple[int, ...], max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids={"ids": prompt},  # type: ignore[arg-type]
        sampling={"temperature": 0.0},  # type: ignore[arg-type]
        stopping={"max_tokens": max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
    )
