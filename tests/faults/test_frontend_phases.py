"""Frontends and the registry killed and stopped while requests are in each phase of their legs.

A request is its frontend's: it ends with it, and its client gets an error or has a deadline. Requests of another
frontend go on, and no worker keeps a leg of it. The registry has no part in a request at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tandem.client import calls
from tandem.errors import DeadlinePassed, ServiceError
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.history import Asked, History, now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S, LegCluster, leg_cluster
from tests.faults.support.leg_trace import RequestTrace, under_load
from tests.faults.support.process_faults import frozen, kill
from tests.faults.support.steady_load import Shape

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

VICTIMS = {
    "bootstrapping": "prefill-0",
    "prefilling": "prefill-0",
    "transferring": "prefill-0",
    "decoding": "decode-0",
}
"""The worker that has requests in the phase."""
IMPATIENT = Shape(rate_per_s=16, long_every=4, long_tokens=140, deadline_s=3)
STOPPED_S = 3.0
"""Longer than a lease."""


def phases(smoke: str) -> list[object]:
    return [pytest.param(phase, marks=[] if phase == smoke else pytest.mark.fault_matrix) for phase in VICTIMS]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LegCluster]:
    async with leg_cluster(tmp_path_factory.mktemp("frontend-phases")) as cluster:
        yield cluster


@pytest.mark.parametrize("phase", phases("transferring"))
async def test_a_killed_frontend_ends_its_own_requests_and_no_others(cluster: LegCluster, phase: str) -> None:
    door = cluster.frontends[0].address
    async with under_load(cluster, f"kill of frontend-0, {phase}", but=_at(door, ServiceError)) as trace:
        await trace.hold(VICTIMS[phase], phase)
        trace.fault_s = await kill(cluster.frontends[0])
        cluster.release()
        had = _had(trace, door)
        await _no_leg_but_of(cluster, trace, door)
        await trace.answered()
    late = had.where(lambda asked: (asked.end_s or 0) - trace.fault_s > 1.0 + BUSY_MACHINE_S)
    assert not len(late), f"clients with a late response:\n{late.lines()}"


@pytest.mark.parametrize("phase", phases("decoding"))
async def test_clients_of_a_stopped_frontend_have_their_deadlines(cluster: LegCluster, phase: str) -> None:
    door = cluster.frontends[0].address
    but = _at(door, DeadlinePassed)
    async with under_load(cluster, f"stop of frontend-0, {phase}", but=but, shape=IMPATIENT) as trace:
        await trace.hold(VICTIMS[phase], phase)
        async with frozen(cluster.frontends[0].pid) as trace.fault_s:
            cluster.release()
            had = _had(trace, door)
            over_s = trace.fault_s + IMPATIENT.deadline_s
            await assert_eventually(lambda: now_s() > over_s, within_s=10, what="the deadlines of what it had")
            # Who stands still can end nothing: it is the deadline that each leg has by itself.
            await _no_leg_but_of(cluster, trace, door)
            await trace.answered()
    late = had.where(lambda asked: (asked.end_s or 0) - asked.start_s > IMPATIENT.deadline_s + BUSY_MACHINE_S)
    assert not len(late), f"clients that waited beyond their deadlines:\n{late.lines()}"


@pytest.mark.parametrize("phase", phases("bootstrapping"))
async def test_a_stopped_registry_is_nothing(cluster: LegCluster, phase: str) -> None:
    async with under_load(cluster, f"stop of the registry, {phase}") as trace:
        before = await _epochs(cluster)
        await trace.hold(VICTIMS[phase], phase)
        async with frozen(cluster.registries[0].pid) as trace.fault_s:
            cluster.release()
            await asyncio.sleep(STOPPED_S)
            await trace.answered(20)
        await trace.answered(20)
        assert await _epochs(cluster) == before, "a worker was buried, or has come back as another start"
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"


@pytest.mark.parametrize("phase", phases("")[:3])
async def test_a_killed_registry_is_nothing_before_the_first_token_either(cluster: LegCluster, phase: str) -> None:
    async with under_load(cluster, f"kill of the registry, {phase}") as trace:
        await trace.hold(VICTIMS[phase], phase)
        trace.fault_s = await kill(cluster.registries[0])
        cluster.release()
        await trace.answered(20)
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"


def _at(door: str, kind: type[Exception]) -> Callable[[Asked], bool]:
    return lambda asked: asked.frontend == door and isinstance(asked.failure, kind)


def _had(trace: RequestTrace, door: str) -> History:
    had = trace.load.history.running_at(trace.fault_s).where(lambda asked: asked.frontend == door)
    verdicts.is_large_enough(had, 1, "what the frontend had")
    return had


async def _no_leg_but_of(cluster: LegCluster, trace: RequestTrace, door: str) -> None:
    """Return when decode workers have no more legs than the other frontends have requests."""

    async def too_many() -> int:
        loads = [await calls.worker_load(worker.address) for worker in cluster.of_role("decode")]
        others = trace.load.history.where(lambda asked: asked.end_s is None and asked.frontend != door)
        return sum(load.open_legs for load in loads) - len(others)

    within_s = IDLE_WITHIN_S + BUSY_MACHINE_S
    await assert_eventually(too_many, lambda count: count <= 0, within_s=within_s, what="no leg of that frontend")


async def _epochs(cluster: LegCluster) -> dict[str, int]:
    listed = await calls.list_workers(cluster.registries[0].address)
    return {entry.worker.worker_id: entry.worker.epoch for entry in listed}
