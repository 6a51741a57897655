"""Workers that fail every request, alone and all at once: who is left out, who never is, and how soon that ends.

The engine fails by its own rules, so health, connections and canaries all say that the worker is well.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tandem_frontend.routing.circuit_breaker import OPEN_MAX_S

from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import LegCluster, leg_cluster
from tests.faults.support.leg_trace import under_load
from tests.faults.support.steady_load import Shape, steady_load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

WATCHED_S = 8.0
PROBES_MAX = 6
"""Of one frontend in that time: after one second, two, four, each drawn from its upper half, and one in flight."""
SHAPE = Shape(rate_per_s=24, long_every=0, deadline_s=20)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("breakers")) as cluster:
        yield cluster


def logged(cluster: LegCluster, words: str) -> list[int]:
    """How often each frontend has said so."""
    return [len(re.findall(words, frontend.log.read_text())) for frontend in cluster.frontends]


async def ejected_by_all(cluster: LegCluster, name: str) -> None:
    sentence = rf"circuit breaker opened for worker {name} "
    before = logged(cluster, sentence)
    opened = lambda: [now - then for now, then in zip(logged(cluster, sentence), before, strict=True)]  # noqa: E731
    await assert_eventually(opened, all, within_s=20, what=f"breakers of {name}")


@pytest.mark.parametrize(("victim", "point"), [("decode-0", "decode_step"), ("prefill-0", "prefill_chunk")])
async def test_a_worker_that_fails_every_request_gets_probes_only(cluster: LegCluster, victim: str, point: str) -> None:
    others = rf"circuit breaker opened for worker (?!{victim})\S+ "
    others_before = logged(cluster, others)
    closed_words = f"circuit breaker closed for worker {victim}:"
    async with under_load(cluster, f"{victim} fails every request") as trace:
        trace.fault_s = now_s()
        cluster.inject(victim, {"point": point, "kind": "fail"})
        await ejected_by_all(cluster, victim)
        # What was on its way when the last breaker opened.
        await asyncio.sleep(0.5)
        before, asked_s = len(cluster.fired(victim)), now_s()
        await asyncio.sleep(WATCHED_S)
        failed = cluster.fired(victim)[before:]
        asked = len(trace.load.history.begun(asked_s))
        reached = len({fired["request_id"] for fired in failed})
        assert 1 <= reached <= PROBES_MAX * len(cluster.frontends), f"{reached} of {asked} requests reached {victim}"
        assert logged(cluster, others) == others_before, "another worker was ejected"
        cluster.release()
        healed_s = now_s()
        closed = logged(cluster, closed_words)
        again = lambda: [now - then for now, then in zip(logged(cluster, closed_words), closed, strict=True)]  # noqa: E731
        await assert_eventually(again, all, within_s=OPEN_MAX_S + 4, what="closed breakers")
        served_s = now_s()
        await trace.answered()
        assert served_s - healed_s < OPEN_MAX_S + 4
    verdicts.went_to(trace.load.history, victim, served_s)
    shared = trace.load.history.begun(served_s).served_by(victim)
    verdicts.is_large_enough(shared, 2, f"what {victim} got after its breaker had closed")


async def test_a_burst_in_which_all_fail_ejects_no_worker(cluster: LegCluster) -> None:
    sentence = "circuit breaker opened for worker"
    async with cluster.views() as views:
        cluster.release()
        await cluster.restore(views)
        before = logged(cluster, sentence)
        async with steady_load([frontend.address for frontend in cluster.frontends], SHAPE) as load:
            await load.wait_ended(20)
            for _ in range(3):
                for worker in cluster.workers:
                    point = "prefill_chunk" if worker.role == "prefill" else "decode_step"
                    cluster.inject(worker.name, {"point": point, "kind": "fail"})
                fired = {worker.name: len(cluster.fired(worker.name)) for worker in cluster.workers}
                struck = lambda: [len(cluster.fired(name)) - then for name, then in fired.items() if "prefill" in name]  # noqa: B023, E731
                await assert_eventually(struck, all, within_s=10, what="failures of all")
                await asyncio.sleep(0.4)
                cluster.release()
                over_s = now_s()
                await load.wait_ended(20)
            await asyncio.sleep(1.0)
            await load.wait_ended(40)
        lost = load.history.failed()
        verdicts.is_large_enough(lost, 3, "what the bursts have cost")
        verdicts.none_failed(load.history.begun(over_s + 1.0))
        assert logged(cluster, sentence) == before, "a burst that struck all left a worker out"
        later = load.history.begun(over_s + 1.0)
        for worker in cluster.workers:
            verdicts.went_to(later, worker.name, over_s)
