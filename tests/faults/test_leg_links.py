"""The way from the frontends to one decode worker breaks under a steady load; worker and registry go on.

The worker is registered with the address of a link, so the frontends' legs and questions pass it and nothing else does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from tandem.client import calls
from tandem.testing.eventually import assert_eventually
from tests.faults.support.cut_proxy import Cut
from tests.faults.support.fault_cluster import CUT_WORKER
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, LegCluster, leg_cluster
from tests.faults.support.leg_trace import gaps_are_short, under_load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

BOUNDS_S = {Cut.SILENT: 2.0, Cut.RESET: 0.5, Cut.CLOSED: 0.5}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("links")) as cluster:
        yield cluster


@pytest.mark.parametrize(
    "cuts",
    [(Cut.SILENT,), (Cut.RESET,), (Cut.CLOSED,), (Cut.SILENT, Cut.CLOSED)],
    ids=["black-hole", "reset", "close", "slow-close"],
)
async def test_a_broken_hop_loses_no_token(cluster: LegCluster, cuts: Sequence[Cut]) -> None:
    link = cluster.worker_links[-1]
    async with under_load(cluster, f"hop to {CUT_WORKER}: {' then '.join(cut.value for cut in cuts)}") as trace:
        await trace.hold(CUT_WORKER, "decoding")
        trace.fault_s = now_s()
        for number, cut in enumerate(cuts):
            await asyncio.sleep(0.3 * number)
            await link.sever(cut)
        await trace.answered(20)
        assert link.held_count or cuts[-1] is Cut.CLOSED, "void: nothing met the cut"
        assert cluster.processes[CUT_WORKER].runs
        if cuts[-1] is not Cut.SILENT:
            # Its side of each connection is gone, and with it every leg: only a black hole can hide that from it.
            await _is_left_alone(cluster)
    gaps_are_short(trace.load.history, trace, CUT_WORKER, max(BOUNDS_S[cut] for cut in cuts) + BUSY_MACHINE_S)


async def _is_left_alone(cluster: LegCluster) -> None:
    """The worker behind the link has no leg left; asked past the link, where it really listens."""
    port = cluster.processes[CUT_WORKER].address.rpartition(":")[2]

    async def legs() -> int:
        return (await calls.worker_load(f"127.0.0.1:{port}")).open_legs

    await assert_eventually(legs, lambda count: count == 0, within_s=1.0 + BUSY_MACHINE_S, what="no leg behind the cut")
