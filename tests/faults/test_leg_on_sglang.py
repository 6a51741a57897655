"""Legs of the real engine that break: continued token for token, cancelled without a trace, and told as what they are.

One prefill and two decode engines, started once. The tests stand in an order: each death takes a worker away for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import LegFailed, TandemError
from tandem.rpc import clients
from tandem.runtime.cluster import ClusterProcess
from tandem.testing.eventually import assert_eventually
from tests.faults.fault_cluster import FaultCluster, Plan, fault_cluster
from tests.faults.history import Asked, History, now_s
from tests.faults.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S
from tests.faults.leg_report import LINES, figures_of, report
from tests.faults.process_faults import frozen, kill
from tests.faults.steady_load import _note

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
]

TOKENS = 120
DRAW = random.Random(11)
LONG_PROMPTS = 6
KV_OF_A_DEAD_PEER_S = 60.0
"""SGLang gives the memory of a hand-over back when it has noticed by itself that its peer is gone."""


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(DRAW.randrange(6, 1536) for _ in range(length))


PROMPTS = tuple(prompt_of(length) for length in (9, 40, 150, 300))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultCluster]:
    flags = {"engine": "sglang", "dtype": "float32"}
    plan = Plan(registries=1, frontends=1, prefill=1, decode=2, lease_s=5.0, worker_flags=flags)
    async with fault_cluster(tmp_path_factory.mktemp("legs-on-sglang"), plan) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def undisturbed(cluster: FaultCluster) -> dict[tuple[int, ...], list[int]]:
    """What the engines answer to each prompt when nothing breaks."""
    history = await streams(cluster, PROMPTS)
    assert not len(history.failed()), history.lines()
    assert {len(asked.tokens) for asked in history.asked} == {TOKENS}
    return {asked.prompt: asked.tokens for asked in history.asked}


async def streams(
    cluster: FaultCluster,
    prompts: tuple[tuple[int, ...], ...],
    meanwhile: Callable[[History], Awaitable[object]] | None = None,
) -> History:
    """Ask all prompts at once, and do something while they are answered."""
    history = History()
    async with asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts):
            asked = Asked(number, cluster.frontends[0].address, prompt, TOKENS, now_s())
            history.asked.append(asked)
            group.create_task(follow(asked))
        if meanwhile is not None:
            await meanwhile(history)
    return history


async def follow(asked: Asked) -> None:
    request = pb.GenerateRequest(
        token_ids={"ids": asked.prompt},  # type: ignore[arg-type]
        sampling={"temperature": 0.0},  # type: ignore[arg-type]
        stopping={"max_tokens": asked.max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
    )
    try:
        async with contextlib.aclosing(clients.generate(asked.frontend, request, 120)) as events:
            async for event in events:
                _note(asked, event)
    except TandemError as problem:
        asked.failure = problem
    finally:
        asked.end_s = now_s()


async def decoding(history: History, least: int = 10) -> str:
    """Return when all streams have some tokens; the decode worker that has most of them."""
    await assert_eventually(
        lambda: min(len(asked.tokens) for asked in history.asked), lambda count: count >= least, within_s=60
    )
    workers = [asked.workers[1] for asked in history.asked]
    return max(set(workers), key=workers.count)


async def kv_used(cluster: FaultCluster) -> dict[str, int]:
    loads = {w.name: await clients.worker_load(w.address) for w in cluster.workers if w.runs}
    return {name: load.kv_used_tokens + load.open_legs + load.running_requests for name, load in loads.items()}


async def legs(cluster: FaultCluster) -> int:
    return sum([(await clients.worker_load(w.address)).open_legs for w in cluster.workers if w.runs])


async def assert_no_kv(cluster: FaultCluster, within_s: float = IDLE_WITHIN_S + BUSY_MACHINE_S) -> None:
    await assert_eventually(lambda: kv_used(cluster), lambda used: not any(used.values()), within_s=within_s)


def scheduler_of(worker: ClusterProcess) -> int:
    """The process of that worker's engine that runs the model: it keeps its figures in shared memory."""
    for child in psutil.Process(worker.pid).children(recursive=True):
        if "/dev/shm/sglang_loads_" in Path(f"/proc/{child.pid}/maps").read_text():
            return child.pid
    raise AssertionError(f"{worker.name} has no scheduler")


async def serves(worker: ClusterProcess) -> bool:
    return await clients.is_serving(worker.address)


def same(history: History, undisturbed: dict[tuple[int, ...], list[int]]) -> None:
    for asked in history.asked:
        assert asked.failure is None, asked.told()
        assert asked.tokens == undisturbed[asked.prompt], asked.told()
        assert (asked.finish_count, asked.misplaced_count) == (1, 0)


async def test_a_client_that_leaves_a_decoding_stream_leaves_no_kv(
    cluster: FaultCluster, undisturbed: dict[tuple[int, ...], list[int]]
) -> None:
    await assert_no_kv(cluster)
    tasks = [
        asyncio.create_task(follow(asked := Asked(number, cluster.frontends[0].address, prompt, 1_500, now_s())))
        for number, prompt in enumerate(PROMPTS)
    ]
    await assert_eventually(lambda: kv_used(cluster), lambda used: used["decode-0"] + used["decode-1"] > 0, within_s=30)
    await assert_eventually(lambda: len(asked.tokens), lambda count: count > 10, within_s=30)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await assert_no_kv(cluster)


async def test_a_scheduler_that_is_stopped_loses_its_streams_to_the_other_worker(
    cluster: FaultCluster, undisturbed: dict[tuple[int, ...], list[int]]
) -> None:
    times: dict[str, float] = {}

    async def stop(history: History) -> None:
        victim = cluster.processes[await decoding(history)]
        async with frozen(scheduler_of(victim)) as times["stopped"]:
            not_serving = lambda serving: not serving  # noqa: E731
            await assert_eventually(lambda: serves(victim), not_serving, within_s=5, what="NOT_SERVING")
            open_ones = lambda: len(history.where(lambda asked: asked.end_s is None))  # noqa: E731
            await assert_eventually(open_ones, lambda count: not count, within_s=60, what="the streams' ends")
        await assert_eventually(lambda: serves(victim), within_s=60, what="SERVING after a canary")

    history = await streams(cluster, PROMPTS, stop)
    same(history, undisturbed)
    assert len(history.where(lambda asked: asked.went_on)), "void: no stream had to go on elsewhere"
    await assert_no_kv(cluster, within_s=5)
    report("SGLang: stop of a decode scheduler", figures_of(history, times["stopped"]))


async def test_greedy_streams_across_a_killed_decode_worker_are_the_undisturbed_ones(
    cluster: FaultCluster, undisturbed: dict[tuple[int, ...], list[int]]
) -> None:
    times: dict[str, float] = {}

    async def strike(history: History) -> None:
        times["killed"] = await kill(cluster.processes[await decoding(history)])

    history = await streams(cluster, PROMPTS, strike)
    same(history, undisturbed)
    assert len(history.where(lambda asked: asked.went_on)), "void: no stream had to go on elsewhere"
    await assert_no_kv(cluster)
    report("SGLang: kill of a decode worker", figures_of(history, times["killed"]))


async def test_without_any_prefill_worker_left_a_request_fails_typed_and_leaves_nothing(cluster: FaultCluster) -> None:
    prompts = tuple(prompt_of(1_800) for _ in range(LONG_PROMPTS))
    times: dict[str, float] = {}

    async def strike(history: History) -> None:
        await assert_eventually(lambda: kv_used(cluster), lambda used: used["prefill-0"] > 0, within_s=30)
        os.kill(cluster.processes["prefill-0"].pid, signal.SIGKILL)
        times["killed"] = now_s()

    history = await streams(cluster, prompts, strike)
    early = history.where(lambda asked: not asked.tokens or asked.token_times_s[0] > times["killed"])
    assert len(early), "void: every prompt had its first token before the kill"
    failed = early.failed()
    assert len(failed), "nobody can have computed the prompts of these"
    for asked in failed.asked:
        assert isinstance(asked.failure, LegFailed) or asked.failure.reason == "UNAVAILABLE", asked.told()
        assert (asked.end_s or 0.0) - times["killed"] < 2.0 + BUSY_MACHINE_S, asked.told()
    await cluster.processes["prefill-0"].wait_ended()
    await assert_eventually(lambda: legs(cluster), lambda count: not count, within_s=IDLE_WITHIN_S + BUSY_MACHINE_S)
    await assert_no_kv(cluster, within_s=KV_OF_A_DEAD_PEER_S)
    report("SGLang: kill of the only prefill worker", figures_of(history, times["killed"]))
    LINES.append(f"SGLang: KV of hand-overs whose prefill worker died was free after {now_s() - times['killed']:.1f} s")
