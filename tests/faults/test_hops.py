"""Every hop of a request, and the ways to the registry, cut and slowed in every way under a steady load.

One cluster with a link on each hop. What is behind the link has a neighbour that is not, so nothing may fail but what
a client asked through a cut door, and only where the cut breaks connections.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tandem.client import calls
from tandem.errors import DeadlinePassed, ServiceError
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.cut_proxy import SLOWED, Cut
from tests.faults.support.fault_cluster import CUT_WORKER
from tests.faults.support.history import Asked, now_s
from tests.faults.support.hop_cluster import CUT_PREFILL, HAND_OVER_TIMEOUT_S, Hop, HopCluster, hop_cluster
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S
from tests.faults.support.leg_trace import RequestTrace, gaps_are_short, under_load
from tests.faults.support.steady_load import Shape

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

CUTS = [cut for cut in Cut if cut is not Cut.NONE]
BROKEN_S = 0.5
"""From a broken connection to a request's next token."""
SILENT_S = 2.0
"""From a connection that says nothing any more."""
IMPATIENT = Shape(rate_per_s=16, long_every=4, long_tokens=140, deadline_s=3)
LEASES_PASS_S = 2.5
"""Longer than a lease of this cluster."""
SMOKE = {
    (Hop.CLIENT, Cut.HALF),
    (Hop.PREFILL, Cut.TRICKLE),
    (Hop.DECODE, Cut.HALF),
    (Hop.BOOTSTRAP, Cut.SILENT),
    (Hop.WORKER_REGISTRY, Cut.SILENT),
    (Hop.FRONTEND_REGISTRY, Cut.LATE),
}
"""What continuous integration runs too: each hop once, most cuts once."""


def cases(*hops: Hop) -> list[object]:
    return [
        pytest.param(
            hop,
            cut,
            id=f"{hop.name.lower()}-{cut.value}",
            marks=[] if (hop, cut) in SMOKE else pytest.mark.fault_matrix,
        )
        for hop in hops
        for cut in CUTS
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[HopCluster]:
    async with hop_cluster(tmp_path_factory.mktemp("hops")) as cluster:
        yield cluster


async def cut_and_prove(trace: RequestTrace, cluster: HopCluster, hop: Hop, cut: Cut) -> None:
    """Bring the fault in, and return when something has met it."""
    link = cluster.by_hop[hop]
    trace.fault_s = now_s()
    await cluster.sever(hop, cut)
    await assert_eventually(lambda: link.held_count, within_s=10, what=f"something that met the cut of {hop.value}")


def scenario(hop: Hop, cut: Cut) -> str:
    return f"{hop.value}: {cut.value}"


@pytest.mark.parametrize(("hop", "cut"), cases(Hop.PREFILL, Hop.DECODE))
async def test_a_cut_hop_to_a_worker_loses_no_token(cluster: HopCluster, hop: Hop, cut: Cut) -> None:
    worker = CUT_PREFILL if hop is Hop.PREFILL else CUT_WORKER
    async with under_load(cluster, scenario(hop, cut), doors=cluster.doors) as trace:
        await trace.hold(worker, "prefilling" if hop is Hop.PREFILL else "decoding")
        await cut_and_prove(trace, cluster, hop, cut)
        cluster.release()
        await trace.answered(20)
        assert cluster.processes[worker].runs
    if cut not in SLOWED:
        bound_s = SILENT_S if cut is Cut.SILENT else BROKEN_S
        gaps_are_short(trace.load.history, trace, worker, bound_s + BUSY_MACHINE_S)


@pytest.mark.parametrize(("hop", "cut"), cases(Hop.BOOTSTRAP))
async def test_a_cut_kv_hop_loses_no_token(cluster: HopCluster, hop: Hop, cut: Cut) -> None:
    async with under_load(cluster, scenario(hop, cut), doors=cluster.doors) as trace:
        await trace.hold(CUT_PREFILL, "transferring")
        await cut_and_prove(trace, cluster, hop, cut)
        cluster.release()
        await trace.answered(20)
    if cut not in SLOWED:
        # Only the engines know that a peer does not come: their own bound is the one that ends the wait.
        bound_s = HAND_OVER_TIMEOUT_S + BROKEN_S if cut is Cut.SILENT else BROKEN_S
        gaps_are_short(trace.load.history, trace, CUT_PREFILL, bound_s + BUSY_MACHINE_S)


@pytest.mark.parametrize(("hop", "cut"), cases(Hop.WORKER_REGISTRY, Hop.FRONTEND_REGISTRY))
async def test_a_cut_way_to_the_registry_is_nothing_to_a_request(cluster: HopCluster, hop: Hop, cut: Cut) -> None:
    async with under_load(cluster, scenario(hop, cut), doors=cluster.doors) as trace:
        await trace.hold(CUT_WORKER, "decoding")
        await cut_and_prove(trace, cluster, hop, cut)
        over_s = trace.fault_s + LEASES_PASS_S
        if hop is Hop.WORKER_REGISTRY and cut not in SLOWED:
            await _is_listed(cluster, CUT_WORKER, False)
        await assert_eventually(lambda: now_s() > over_s, within_s=10, what="the end of a lease")
        await trace.answered(20)
        if cut in SLOWED:
            await _is_listed(cluster, CUT_WORKER, True)
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"
    if hop is Hop.WORKER_REGISTRY:
        verdicts.went_to(trace.load.history, CUT_WORKER, trace.over_s)


@pytest.mark.parametrize(("hop", "cut"), cases(Hop.CLIENT))
async def test_a_cut_way_of_a_client_is_nothing_to_the_others(cluster: HopCluster, hop: Hop, cut: Cut) -> None:
    breaks = cut not in (*SLOWED, Cut.SILENT)
    async with under_load(cluster, scenario(hop, cut), doors=cluster.doors, but=_by(cluster, cut)) as trace:
        await trace.load.wait_running(4)
        await cut_and_prove(trace, cluster, hop, cut)
        had = trace.load.history.running_at(trace.fault_s).where(lambda asked: asked.frontend == cluster.doors[0])
        verdicts.is_large_enough(had, 1, "what was asked through the cut door")
        if breaks:
            await _holds_no_more_than_the_others(cluster, trace)
        await trace.answered(20)
    if breaks:
        late = had.where(lambda asked: (asked.end_s or 0) - trace.fault_s > 1.0 + BUSY_MACHINE_S)
        assert not len(late), f"clients with a late response:\n{late.lines()}"
    else:
        assert not len(trace.load.history.failed())


@pytest.mark.fault_matrix
async def test_a_black_hole_before_a_client_ends_with_its_deadlines(cluster: HopCluster) -> None:
    door = cluster.doors[0]
    but = lambda asked: asked.frontend == door and isinstance(asked.failure, DeadlinePassed)  # noqa: E731
    name = f"{Hop.CLIENT.value}: silent beyond the deadlines"
    async with under_load(cluster, name, but=but, doors=cluster.doors, shape=IMPATIENT) as trace:
        await trace.load.wait_running(4)
        await cut_and_prove(trace, cluster, Hop.CLIENT, Cut.SILENT)
        had = trace.load.history.running_at(trace.fault_s).where(lambda asked: asked.frontend == door)
        over_s = trace.fault_s + IMPATIENT.deadline_s
        await assert_eventually(lambda: now_s() > over_s, within_s=10, what="the deadlines of who is cut off")
        # The clients cannot say that they have left: the frontend has their deadlines too.
        await _holds_no_more_than_the_others(cluster, trace)
        await trace.answered(20)
    late = had.where(lambda asked: (asked.end_s or 0) - asked.start_s > IMPATIENT.deadline_s + BUSY_MACHINE_S)
    assert not len(late), f"clients that waited beyond their deadlines:\n{late.lines()}"


def _by(cluster: HopCluster, cut: Cut) -> Callable[[Asked], bool]:
    """Those a cut of the clients' door may fail: asked there, and refused because the service is not there."""

    def may_fail(asked: Asked) -> bool:
        is_there = asked.frontend == cluster.doors[0]
        return is_there and cut not in (*SLOWED, Cut.SILENT) and isinstance(asked.failure, ServiceError)

    return may_fail


async def _holds_no_more_than_the_others(cluster: HopCluster, trace: RequestTrace) -> None:
    """The workers have no leg of a client that is cut off: no more than the other door has requests."""

    async def too_many() -> int:
        loads = [await calls.worker_load(worker.address) for worker in cluster.of_role("decode")]
        open_ones = trace.load.history.where(lambda asked: asked.end_s is None)
        return sum(load.open_legs for load in loads) - len(open_ones)

    within_s = IDLE_WITHIN_S + BUSY_MACHINE_S
    await assert_eventually(too_many, lambda count: count <= 0, within_s=within_s, what="no leg of who is cut off")


async def _is_listed(cluster: HopCluster, worker: str, wanted: bool) -> None:
    async def names() -> list[str]:
        return [entry.worker.worker_id for entry in await calls.list_workers(cluster.registries[0].address)]

    what = f"{worker} {'in' if wanted else 'out of'} the view"
    await assert_eventually(names, lambda found: (worker in found) is wanted, within_s=10, what=what)
