"""One outage from whole to whole under a steady load, and what must be true of every one of them.

Owns the order of things: whole, load, break with proof, a worker killed meanwhile, repair, whole again. What breaks and
how it is proved is the caller's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.fault_cluster import FaultCluster
from tests.faults.support.history import History, now_s
from tests.faults.support.leg_report import report_test
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape, steady_load
from tests.faults.support.verdicts import Oracle
from tests.faults.support.views import Views
from tests.integration.support.consul_host import ConsulHost

AVOIDED_WITHIN_S = 1.5
"""Three looks of a frontend at its workers; measured and held to a second in benchmarks."""

NOTICED_S = 20.0
"""A registry asks Consul to wait with its answer, and cannot distinguish a long wait from a cut link."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an outage happens."""

    cluster: FaultCluster
    consul: ConsulHost


Step = Callable[[Place], Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """How an outage goes."""

    shape: Shape
    oracle: Oracle
    floor: int
    """Answers before, during and after it; fewer prove nothing."""
    victim: str | None
    """The worker that is killed meanwhile."""


@dataclass(slots=True)
class _Times:
    begun_s: float = 0.0
    proved_s: float = 0.0
    killed_s: float = 0.0
    mended_s: float = 0.0


async def through_outage(
    place: Place, trace: RequestTrace, begin: Step, end: Step, meanwhile: Callable[[Views], bool]
) -> None:
    """A whole outage that lasts for longer than a lease, and its judgement.

    Args:
        place: where; whole before and after.
        trace: where its times are recorded.
        begin: breaks something, and proves that it is broken.
        end: repairs it.
        meanwhile: whether the registries say of it what they must; waited for before the repair.
    """
    cluster, times = place.cluster, _Times()
    async with cluster.views() as views:
        # Also after an outage that a test did not get through.
        await cluster.restore(views)
        async with steady_load([frontend.address for frontend in cluster.frontends], trace.shape) as load:
            await load.wait_ended(trace.floor)
            await load.wait_running(1)
            times.begun_s = now_s()
            await begin(place)
            times.proved_s = now_s()
            await load.wait_ended(trace.floor)
            times.killed_s = now_s() if trace.victim is None else await kill(cluster.processes[trace.victim])
            over_s = times.killed_s + 2 * cluster.plan.lease_s
            await assert_eventually(lambda: now_s() > over_s, within_s=60, what="the end of every lease")
            await load.wait_ended(trace.floor)
            await assert_eventually(lambda: meanwhile(views), within_s=NOTICED_S, what="what the registries say of it")
            times.mended_s = now_s()
            await end(place)
            await cluster.restore(views)
            await load.wait_ended(trace.floor)
    _judge(load.history, trace, times)
    report_test(load.history, times.begun_s)


def live(views: Views) -> bool:
    """Every registry that responds reports the present view."""
    return views.sources() == {pb.VIEW_SOURCE_LIVE}


def last_known(views: Views) -> bool:
    """Every registry answers, and says that its view is the last known one."""
    return views.sources() == {pb.VIEW_SOURCE_LAST_KNOWN}


def answering(views: Views) -> bool:
    """Some registry answers, whatever it knows."""
    return bool(views.sources())


def silent(views: Views) -> bool:
    """No registry answers."""
    return not views.sources()


def _judge(history: History, trace: RequestTrace, times: _Times) -> None:
    victim = trace.victim or ""
    verdicts.none_failed(history, but=verdicts.held_by(victim, times.killed_s))
    verdicts.tokens_are_exact(history, trace.oracle)
    # Those that the victim held are no longer among them; the load made sure that there was one.
    verdicts.ran_through(history.where(lambda asked: asked.failure is None), times.begun_s, least=1)
    verdicts.is_large_enough(history.begun(times.proved_s, times.killed_s), trace.floor)
    verdicts.is_large_enough(history.begun(times.killed_s, times.mended_s), trace.floor)
    if trace.victim is not None:
        after_kill = history.begun(times.killed_s, times.mended_s)
        verdicts.none_went_to(after_kill, victim, times.killed_s + AVOIDED_WITHIN_S)
        verdicts.went_to(history, victim, times.mended_s)
