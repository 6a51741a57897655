"""Workers are restarted one after another under a steady load, as an orchestrator does it: the next one only once the
one before is healthy. No request fails, also while no registry answers, and also where a drain ends before its streams.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.demo_answers import demo_answers
from tests.faults.support.fault_cluster import FaultCluster, Plan, fault_cluster
from tests.faults.support.history import now_s
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape, steady_load
from tests.integration.support.consul_host import consul_servers

pytestmark = pytest.mark.timeout(180)

RATE = Shape(rate_per_s=20, long_tokens=100)
FLOOR = 30
"""Answers during each part; fewer prove nothing."""


async def healthy(process: ClusterProcess, service: str = "") -> bool:
    """What a health check of an orchestrator sees."""
    address = f"{process.flags.get('advertise-host', '127.0.0.1')}:{process.flags['port']}"
    try:
        return await calls.is_serving(address, service)
    except TandemError:
        return False


async def roll(cluster: FaultCluster, workers: Iterable[ClusterProcess]) -> list[int]:
    """Restart workers in turn, waiting for the health of each without a bound; returns their exit statuses."""
    statuses: list[int] = []
    for worker in workers:
        worker.signal(signal.SIGTERM)
        statuses.append(await worker.wait_ended())
        await cluster.begin_restart(worker.name)
        while not await healthy(worker):  # noqa: ASYNC110 -- an orchestrator polls, too
            await asyncio.sleep(0.1)
    return statuses


async def test_a_rolling_restart_without_a_registry_keeps_the_workers_that_are_left(
    consul_binary: Path, tmp_path: Path
) -> None:
    async with (
        consul_servers(consul_binary, tmp_path / "consul", 1) as consul,
        fault_cluster(tmp_path, Plan(consul=consul.address)) as cluster,
        cluster.views() as views,
    ):
        await cluster.whole(views)
        first, *others = cluster.workers
        pids = {worker.name: worker.pid for worker in cluster.workers}
        async with steady_load([frontend.address for frontend in cluster.frontends], RATE) as load:
            await load.wait_ended(FLOOR)
            for registry in cluster.registries:
                await kill(registry)
            rolling = asyncio.create_task(roll(cluster, cluster.workers))
            # The first one is back, its engine works, and nothing can route to it.
            await assert_eventually(lambda: first.runs and first.pid != pids[first.name], within_s=20)
            await assert_eventually(lambda: healthy(first, PROCESS_SERVICE_NAME), bool, within_s=20)
            alone_s = now_s()
            await load.wait_ended(4 * FLOOR)
            assert not await healthy(first)
            assert [worker.name for worker in others if worker.pid != pids[worker.name]] == []
            verdicts.is_large_enough(load.history.begun(alone_s), 4 * FLOOR)

            await cluster.restart(*(registry.name for registry in cluster.registries))
            async with asyncio.timeout(90):
                statuses = await rolling
            await cluster.whole(views)
            await load.wait_ended(FLOOR)
    assert statuses == [0] * len(pids)
    assert not [worker.name for worker in cluster.workers if worker.pid == pids[worker.name]], "not restarted"
    verdicts.none_failed(load.history)
    verdicts.tokens_are_exact(load.history, demo_answers)


async def test_requests_wait_for_the_only_worker_of_a_role(tmp_path: Path) -> None:
    """More of them than it takes: the others wait in the queue, and its successor does not get all at once."""
    flags = {"engine": "simulated", "engine-extra": '{"decode_step_s": 0.005}', "drain-timeout-s": "0.2"}
    # However busy the machine is that starts the successor.
    plan = Plan(
        registries=1, frontends=1, prefill=1, decode=1, worker_flags=flags, frontend_flags={"no-worker-wait-s": "60"}
    )
    async with fault_cluster(tmp_path, plan) as cluster, cluster.views() as views:
        await cluster.whole(views)
        async with steady_load([frontend.address for frontend in cluster.frontends], RATE) as load:
            for name in ("decode-0", "prefill-0"):
                await load.wait_ended(FLOOR)
                begun_s = now_s()
                assert await roll(cluster, [cluster.processes[name]]) == [0]
                verdicts.is_large_enough(load.history.begun(begun_s), 10)
                await cluster.whole(views)
            await load.wait_ended(FLOOR)
    verdicts.none_failed(load.history)
    verdicts.tokens_are_exact(load.history, demo_answers)


async def test_streams_longer_than_a_drain_go_on_elsewhere(tmp_path: Path) -> None:
    flags = {"engine": "simulated", "engine-extra": '{"decode_step_s": 0.01}', "drain-timeout-s": "0.2"}
    plan = Plan(registries=1, prefill=2, decode=2, worker_flags=flags)
    shape = Shape(rate_per_s=10, long_tokens=300, long_every=2)
    async with fault_cluster(tmp_path, plan) as cluster, cluster.views() as views:
        await cluster.whole(views)
        async with steady_load([frontend.address for frontend in cluster.frontends], shape) as load:
            for name in ("decode-0", "prefill-0", "decode-1", "prefill-1"):
                await load.wait_running(4)
                ended_s = now_s()
                assert await roll(cluster, [cluster.processes[name]]) == [0]
                held = load.history.running_at(ended_s).served_by(name)
                if name.startswith("decode"):
                    verdicts.is_large_enough(held, 1, f"what {name} held")
                await cluster.whole(views)
    moved = load.history.where(lambda asked: asked.went_on)
    verdicts.is_large_enough(moved, 2, "what went on elsewhere")
    verdicts.none_failed(load.history)
    verdicts.tokens_are_exact(load.history, demo_answers)
