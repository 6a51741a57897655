"""The way from Envoy to a frontend cut and slowed in every way, and Envoy itself killed and stopped, under a load.

A stream is with one frontend: where its connection breaks it ends, and its client sees a body without a finish. What
has not begun is asked of the other frontend, and its client notices nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.cut_proxy import Cut
from tests.faults.support.edge_cluster import HEALTH_INTERVAL_S, NOTICED_S, EdgeCluster, edge_cluster
from tests.faults.support.history import Asked, now_s
from tests.faults.support.http_load import HttpLoad
from tests.faults.support.leg_cluster import BUSY_MACHINE_S
from tests.faults.support.leg_trace import FLOOR, RequestTrace, under_load
from tests.faults.support.process_faults import frozen, prove_gone, prove_refused

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

FAILS_FOR_S = {Cut.CLOSED: 0.1, Cut.RESET: 2 * HEALTH_INTERVAL_S, Cut.HALF: 2 * HEALTH_INTERVAL_S}
"""What Envoy has written into a connection before that breaks may have been served, so it is not asked again elsewhere.
Where new connections are taken and then broken, that goes on until two health checks have failed."""
TOLD_S = 0.5
"""A client whose stream broke knows it by then."""


def cuts(smoke: Cut) -> list[object]:
    every = [cut for cut in Cut if cut is not Cut.NONE]
    return [pytest.param(cut, id=cut.value, marks=[] if cut is smoke else pytest.mark.fault_matrix) for cut in every]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EdgeCluster]:
    async with edge_cluster(tmp_path_factory.mktemp("edge-faults")) as cluster:
        yield cluster


@pytest.mark.parametrize("cut", cuts(Cut.CLOSED))
async def test_a_cut_way_to_a_frontend_ends_at_most_what_it_carried(cluster: EdgeCluster, cut: Cut) -> None:
    traces: list[RequestTrace] = []

    def may_fail(asked: Asked) -> bool:
        return asked.start_s < traces[0].fault_s + FAILS_FOR_S[cut] + BUSY_MACHINE_S / 2

    scenario = f"Envoy to frontend-0: {cut.value}"
    doors = [cluster.edge.address]
    but = may_fail if cut in FAILS_FOR_S else lambda asked: False
    async with under_load(cluster, scenario, but=but, doors=doors, kind=HttpLoad) as trace:
        traces.append(trace)
        await trace.load.wait_running(4)
        trace.fault_s = now_s()
        await cluster.link.sever(cut)
        await assert_eventually(lambda: cluster.link.held_count, within_s=10, what="something that met the cut")
        await trace.answered(20)
        if cut is Cut.SILENT:
            await _new_requests_are_not_held_up(trace)
    if cut in FAILS_FOR_S:
        carried = trace.load.history.failed()
        verdicts.is_large_enough(carried, 1, "what the connection carried")

        def is_late(asked: Asked) -> bool:
            assert asked.end_s is not None
            return asked.end_s - max(asked.start_s, trace.fault_s) > TOLD_S + BUSY_MACHINE_S

        late = carried.where(is_late)
        assert not len(late), f"clients with a late response:\n{late.lines()}"


async def _new_requests_are_not_held_up(trace: RequestTrace) -> None:
    """What is asked after Envoy's health checks have had their time goes to the other frontend."""
    noticed_s = trace.fault_s + NOTICED_S + BUSY_MACHINE_S
    await assert_eventually(lambda: now_s() > noticed_s, within_s=20, what="the time of two health checks")
    await trace.answered(2 * FLOOR)
    later = trace.load.history.begun(noticed_s, now_s() - 3.0 - BUSY_MACHINE_S)
    held_up = later.where(lambda asked: asked.end_s is None)
    assert not len(held_up), f"sent to a frontend that says nothing:\n{held_up.lines()}"


async def test_a_killed_envoy_ends_its_streams_in_both_engines(cluster: EdgeCluster) -> None:
    back_s = float("inf")
    but = lambda asked: asked.start_s < back_s  # noqa: E731
    doors = [cluster.edge.address]
    async with under_load(cluster, "kill of Envoy", but=but, doors=doors, kind=HttpLoad) as trace:
        await trace.load.wait_running(4)
        envoy, address = cluster.envoy, cluster.edge.address
        trace.fault_s = now_s()
        envoy.kill()
        await prove_gone(envoy.pid)
        await prove_refused(address)
        # No client can come in: whatever the workers still have is the dead Envoy's.
        await cluster.assert_idle()
        assert await asyncio.wait_for(cluster.edge.wait_ended(), 5) == 1, "an edge without its Envoy goes on"
        await trace.answered()
        await cluster.restart("edge")
        back_s = now_s()
        assert cluster.edge.address == address
    had = trace.load.history.running_at(trace.fault_s)
    verdicts.is_large_enough(had, 4, "what Envoy carried")


@pytest.mark.fault_matrix
async def test_a_stopped_envoy_is_a_pause(cluster: EdgeCluster) -> None:
    doors = [cluster.edge.address]
    async with under_load(cluster, "stop of Envoy for 2 s", doors=doors, kind=HttpLoad) as trace:
        await trace.load.wait_running(4)
        async with frozen(cluster.envoy.pid) as trace.fault_s:
            await asyncio.sleep(2.0)
        await trace.answered(20)
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"
    assert cluster.envoy.is_running()
