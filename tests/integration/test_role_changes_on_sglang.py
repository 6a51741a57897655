"""Roles that change under load, on real engines: in place with the same scheduler process, else with another one."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.controller.app import ControllerApp
from tandem.controller.settings import ControllerConfig
from tandem.domain.worker import Worker, WorkerRole
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.role_changes import (
    AGGREGATED,
    DECODE,
    PREFILL,
    ExactLoad,
    assert_pages_free,
    assert_serves,
    change,
    exact_load,
    workers_of,
)

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(480),
]

LENGTHS = (1, 17, 64, 200, 300)
NEW_TOKENS = 24
CLIENTS = 3
IN_PLACE_S_MAX = 5.0
FIRST_ORDINARY_TOKEN = 6
WORKER = "prefill-1"


def request(length: int) -> pb.GenerateRequest:
    draw = random.Random(length)
    token_ids = [draw.randrange(FIRST_ORDINARY_TOKEN, 1536) for _ in range(length)]
    return request_of(token_ids=token_ids, max_tokens=NEW_TOKENS, ignore_eos=True)


async def asks_of(cluster: LocalCluster) -> Callable[[int], Iterator[tuple[pb.GenerateRequest, list[int]]]]:
    """Requests with the tokens that they get while no role changes."""
    expected = {length: (await generate(cluster, request(length))).token_ids for length in LENGTHS}

    def asks(number: int) -> Iterator[tuple[pb.GenerateRequest, list[int]]]:
        for length in itertools.islice(itertools.cycle(LENGTHS), number, None):
            yield request(length), expected[length]

    return asks


def scheduler_pid(cluster: LocalCluster) -> int:
    """The process of the worker's engine that holds the weights."""
    children = psutil.Process(cluster.process(WORKER).pid).children(recursive=True)
    found = [child.pid for child in children if "scheduler" in child.name()]
    assert len(found) == 1, children
    return found[0]


async def turn(cluster: LocalCluster, load: ExactLoad, role: WorkerRole, *, in_place: bool) -> None:
    before, pid = (await workers_of(cluster))[WORKER], scheduler_pid(cluster)
    done = await change(cluster, WORKER, role, force=before.role is AGGREGATED)
    switch_s = done.switch_time.ToNanoseconds() / 1e9
    print(f"{before.role.value} -> {role.value}: {'in place' if done.in_place else 'restarted'} in {switch_s:.2f} s")
    assert done.in_place is in_place
    assert (scheduler_pid(cluster) == pid) is in_place
    if in_place:
        assert switch_s < IN_PLACE_S_MAX
    await load.wait_served_by(await assert_serves(cluster, before, role, done.worker))


async def controlled_turn(cluster: LocalCluster, load: ExactLoad) -> None:
    """A controller gives decode a worker, by itself: its goal for the ITL is one that no engine reaches."""
    before = await workers_of(cluster)
    config = ControllerConfig(
        registry=(cluster.registry.address,), ttft_s=30.0, itl_s=1e-5, interval_s=0.5, window_s=4.0, confirm_s=1.0
    )
    async with ControllerApp.open(config) as app:

        async def taken() -> list[Worker]:
            present = await workers_of(cluster)
            return [one for one in present.values() if one.role is DECODE and before[one.worker_id].role is PREFILL]

        (worker,) = await assert_eventually(taken, within_s=120, what="a worker that the controller changed")
        await load.wait_served_by(worker)
        assert worker.epoch > before[worker.worker_id].epoch
        # The last prefill worker keeps its role.
        assert [*(one.role for one in (await workers_of(cluster)).values())].count(PREFILL) == 1
        assert await app.drain()


async def test_a_worker_takes_each_role_under_load_and_no_request_fails(tmp_path: Path) -> None:
    async with running(tmp_path, prefill=2, worker_flags={"dtype": "float32"}) as cluster:
        asks = await asks_of(cluster)
        async with exact_load(cluster, CLIENTS, asks) as load:
            await turn(cluster, load, DECODE, in_place=True)
            await turn(cluster, load, PREFILL, in_place=True)
            await turn(cluster, load, AGGREGATED, in_place=False)
            await turn(cluster, load, DECODE, in_place=False)
            await turn(cluster, load, PREFILL, in_place=True)
            await controlled_turn(cluster, load)
        moved = [stream.finish.timings for stream in load.streams if stream.finish.route.prefill_worker_id]
        assert all(timings.kv_transfer_bytes and not timings.recomputed_tokens for timings in moved)
        await assert_pages_free(cluster)
