"""Workers killed and stopped in every phase of a leg, under a steady load: no stream fails, and each is exact.

The phase is held by the engines' own faults, so that the victim has requests in it when it is struck. Routes are drawn
at random there: some requests must come to that worker. Under the default policy the victim is the busiest one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.fault_cluster import Plan
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, LegCluster, leg_cluster
from tests.faults.support.leg_trace import FLOOR, RequestTrace, gaps_are_short, under_load
from tests.faults.support.process_faults import frozen, kill

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

PHASES = ("bootstrapping", "prefilling", "transferring", "decoding")
AFTER_A_KILL_S = 0.5
AFTER_A_STOP_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("deaths")) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def routed_by_load(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("deaths-by-load"), Plan(registries=1)) as cluster:
        yield cluster


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_killed_worker_loses_no_token(cluster: LegCluster, victim: str, phase: str) -> None:
    async with under_load(cluster, f"kill of {victim}, {phase}") as trace:
        await trace.hold(victim, phase)
        trace.fault_s = await kill(cluster.processes[victim])
        cluster.release()
        await trace.answered()
    gaps_are_short(trace.load.history, trace, victim, AFTER_A_KILL_S + BUSY_MACHINE_S, least=2)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_stopped_worker_loses_no_token(cluster: LegCluster, victim: str, phase: str) -> None:
    async with under_load(cluster, f"stop of {victim}, {phase}") as trace:
        await trace.hold(victim, phase)
        await stop(trace, victim)
    gaps_are_short(trace.load.history, trace, victim, AFTER_A_STOP_S + BUSY_MACHINE_S, least=2)


async def stop(trace: RequestTrace, victim: str) -> None:
    """Stop a worker until all that it held has ended, and ten more requests."""
    async with frozen(trace.cluster.processes[victim].pid) as trace.fault_s:
        trace.cluster.release()
        held = trace.load.history.running_at(trace.fault_s).served_by(victim)
        open_ones = lambda: len(held.where(lambda asked: asked.end_s is None))  # noqa: E731
        await assert_eventually(open_ones, lambda count: not count, within_s=15, what="ends of what it held")
        await trace.answered()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_busiest_worker_is_killed_where_routes_go_by_load(routed_by_load: LegCluster, role: str) -> None:
    async with under_load(routed_by_load, f"kill of the busiest {role} worker, by load") as trace:
        victim = await trace.busiest(role)
        trace.fault_s = await kill(routed_by_load.processes[victim])
        await trace.answered()
    gaps_are_short(trace.load.history, trace, victim, AFTER_A_KILL_S + BUSY_MACHINE_S, least=2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_busiest_worker_is_stopped_where_routes_go_by_load(routed_by_load: LegCluster, role: str) -> None:
    async with under_load(routed_by_load, f"stop of the busiest {role} worker, by load") as trace:
        victim = await trace.busiest(role)
        await stop(trace, victim)
    gaps_are_short(trace.load.history, trace, victim, AFTER_A_STOP_S + BUSY_MACHINE_S, least=2)


async def test_a_hung_prefill_worker_does_not_get_all_requests_where_routes_go_by_load(
    routed_by_load: LegCluster,
) -> None:
    """Others are answered by the other worker meanwhile, and nothing is refused."""
    async with under_load(routed_by_load, "hang of the busiest prefill worker, by load") as trace:
        victim = await trace.busiest("prefill")
        trace.fault_s = now_s()
        routed_by_load.inject(victim, {"point": "prefill_chunk", "kind": "hang"})
        await trace.answered(3 * FLOOR)


async def test_a_worker_that_is_killed_twice_is_used_each_time_it_is_back(cluster: LegCluster) -> None:
    async with under_load(cluster, "kill of decode-0, twice at its address") as trace:
        for _ in range(2):
            await trace.hold("decode-0", "decoding")
            killed_s = await kill(cluster.processes["decode-0"])
            trace.fault_s = trace.fault_s or killed_s
            await cluster.restart("decode-0")
            back_s = now_s()
            served = lambda back_s=back_s: len(trace.load.history.begun(back_s).served_by("decode-0"))  # noqa: E731
            await assert_eventually(served, within_s=10, what="an answer by the new start")
    verdicts.is_large_enough(trace.load.history.where(lambda asked: asked.went_on), 2, "streams that broke")
