"""A worker is killed, stands still, loses its network or its address; two registries over Consul, a steady load.

Each time every registry and every frontend must have the right view within the lease and one sweep, no request may fail
but those the worker had in its hands, and a worker that was given up must not serve for its former epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.cut_proxy import Cut
from tests.faults.support.demo_answers import demo_answers, direct_calls
from tests.faults.support.fault_cluster import CUT_WORKER, FaultCluster, Plan, fault_cluster
from tests.faults.support.history import now_s
from tests.faults.support.leg_report import report_test
from tests.faults.support.outage import AVOIDED_WITHIN_S
from tests.faults.support.process_faults import frozen, kill
from tests.faults.support.steady_load import Shape, SteadyLoad, steady_load
from tests.faults.support.views import Views
from tests.integration.support.consul_host import consul_agent

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

LEASE_S = 2.0
GONE_WITHIN_S = 2.5 * LEASE_S
"""A lease, half of one that a registry gives more after a pause of its own, and one for a busy machine."""
SHAPE = Shape(rate_per_s=20)
FLOOR = 20
"""Answers before, during and after each fault."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultCluster]:
    logs = tmp_path_factory.mktemp("faults")
    async with (
        consul_agent(consul_binary, logs) as consul,
        fault_cluster(logs, Plan(consul=consul.address, lease_s=LEASE_S)) as cluster,
    ):
        yield cluster


@asynccontextmanager
async def observed(cluster: FaultCluster) -> AsyncIterator[tuple[SteadyLoad, Views]]:
    """A load and a look at all views, begun on a whole cluster and ended on one."""
    async with cluster.views() as views:
        await cluster.whole(views)
        async with steady_load([frontend.address for frontend in cluster.frontends], SHAPE) as load:
            await load.wait_ended(FLOOR)
            begun_s = now_s()
            yield load, views
            await cluster.restore(views)
            await load.wait_ended(FLOOR)
    verdicts.tokens_are_exact(load.history, demo_answers)
    report_test(load.history, begun_s)


async def test_a_killed_worker_is_gone_everywhere_within_its_lease(cluster: FaultCluster) -> None:
    async with observed(cluster) as (load, views):
        await load.wait_running(1)
        killed_s = await kill(cluster.processes["decode-0"])
        await cluster.whole(views, GONE_WITHIN_S)
        await load.wait_ended(FLOOR)
        back_s = now_s()
    verdicts.none_failed(load.history, but=verdicts.held_by("decode-0", killed_s))
    meanwhile = load.history.begun(0, back_s)
    verdicts.is_large_enough(meanwhile.begun(killed_s), FLOOR)
    verdicts.none_went_to(meanwhile, "decode-0", killed_s + AVOIDED_WITHIN_S)
    verdicts.went_to(load.history, "decode-0", back_s)


async def test_a_worker_that_stood_still_refuses_its_former_epoch(cluster: FaultCluster) -> None:
    worker = cluster.processes["decode-0"]
    async with observed(cluster) as (load, views), direct_calls(worker.address) as calls:
        former = views.epoch(worker.name)
        running = {process.name for process in cluster.workers}
        async with frozen(worker.pid) as frozen_s:
            await views.all_show(running - {worker.name}, within_s=GONE_WITHIN_S)
            await load.wait_ended(FLOOR)
            # It is there when the worker wakes up, before anything else can have shown it that time has passed.
            refused = asyncio.create_task(calls.is_refused_as_stale(former))
            await asyncio.sleep(0.2)
            woken_s = now_s()
        assert await refused, "it serves for a start that was given up"
        await cluster.whole(views, GONE_WITHIN_S)
        assert views.epoch(worker.name) > former
        await load.wait_ended(FLOOR)
    verdicts.none_failed(load.history)
    meanwhile = load.history.begun(frozen_s, woken_s)
    verdicts.is_large_enough(meanwhile, FLOOR)
    verdicts.none_went_to(meanwhile, worker.name, frozen_s + AVOIDED_WITHIN_S)
    verdicts.went_to(load.history, worker.name, woken_s)


async def test_a_worker_without_a_network_is_gone_and_comes_back_as_the_same_start(cluster: FaultCluster) -> None:
    async with observed(cluster) as (load, views):
        epoch = views.epoch(CUT_WORKER)
        cut_s = now_s()
        await cluster.cut_off(Cut.SILENT)
        running = {process.name for process in cluster.workers}
        await views.all_show(running - {CUT_WORKER}, within_s=GONE_WITHIN_S)
        await load.wait_ended(FLOOR)
        assert all(link.held_count for link in cluster.worker_links[-1:]), "nothing was held back"
        back_s = now_s()
        await cluster.reconnect()
        await cluster.whole(views, GONE_WITHIN_S)
        assert views.epoch(CUT_WORKER) == epoch, "it never stood still"
    verdicts.none_failed(load.history, but=verdicts.held_by(CUT_WORKER, cut_s))
    meanwhile = load.history.begun(cut_s, back_s)
    verdicts.is_large_enough(meanwhile, FLOOR)
    verdicts.none_went_to(meanwhile, CUT_WORKER, cut_s + AVOIDED_WITHIN_S)
    verdicts.went_to(load.history, CUT_WORKER, back_s)


async def test_a_worker_whose_address_was_taken_ends_and_serves_no_request(cluster: FaultCluster) -> None:
    robbed = cluster.processes["decode-0"]
    async with observed(cluster) as (load, views), direct_calls(robbed.address) as calls:
        registries = robbed.flags["registry"]
        host, _, port = robbed.address.rpartition(":")
        # Listens elsewhere at the same port: a wrong address was configured, and its owner still lives.
        flags = {**cluster.worker_flags("decode-9", registries), "host": "127.0.0.3", "advertise-host": host}
        thief = await cluster.add("decode-9", "decode", {**flags, "port": port})
        taken_s = now_s()
        assert thief.address == robbed.address
        epoch = await assert_eventually(lambda: views.epoch(thief.name), within_s=GONE_WITHIN_S, what="its entry")
        assert await calls.is_refused_as_stale(epoch), "it serves in the name of another"
        assert await asyncio.wait_for(robbed.wait_ended(), GONE_WITHIN_S) == 1
        # No process is left at that address, and Consul's check of the thief finds that out.
        others = {process.name for process in cluster.workers if process.runs} - {thief.name}
        await views.all_show(others, within_s=GONE_WITHIN_S)
        thief.kill()
        await thief.stop()
        del cluster.processes[thief.name]
    verdicts.none_failed(load.history, but=verdicts.held_by("decode-0", taken_s + GONE_WITHIN_S))
    both = [look for look in views.looks if look.addresses.count(thief.address) > 1]
    assert not both, f"two workers at one address: {both[0]}"
