"""One fault of a leg under a steady load, from whole to whole, and what must be true of every one.

Owns the order of things: whole, load, victims in a phase, fault with proof, answers meanwhile, repair, answers after
it, no leg left. What breaks is the caller's. Nothing may fail, nothing come twice, and no page be lost.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from tandem.testing.eventually import assert_eventually
from tests.faults.support import verdicts
from tests.faults.support.demo_answers import demo_answers
from tests.faults.support.fault_cluster import FaultCluster
from tests.faults.support.history import Asked, History, now_s
from tests.faults.support.leg_cluster import HELD_AT, LegCluster
from tests.faults.support.leg_report import report, results_of
from tests.faults.support.steady_load import Shape, SteadyLoad, steady_load

SHAPE = Shape(rate_per_s=16, long_every=4, long_tokens=140, deadline_s=20)
FLOOR = 10
"""Answers before, during and after each fault; with fewer the run is void."""
HELD_MIN = 2
"""Requests the victim must have in the phase when it is struck."""
AGAIN = re.compile(r'^{"time": "(?P<time>[^"]+)".*(continuing after|trying another route)', re.MULTILINE)


@dataclass(slots=True)
class RequestTrace:
    """What a scenario knows while it runs."""

    cluster: LegCluster
    load: SteadyLoad
    fault_s: float = 0.0
    over_s: float = float("inf")
    """When the cluster was whole again."""

    def held(self, worker_id: str, phase: str | None = None) -> History:
        """What that worker has in its hands now: with tokens if it decodes, without them before."""
        decoding = phase in (None, "decoding")
        running = self.load.history.running_at(now_s()).served_by(worker_id)
        return running.where(lambda asked: bool(asked.tokens) is decoding)

    async def hold(self, victim: str, phase: str) -> None:
        """Return when the victim has requests in that phase, held there by the engines' own faults."""
        if phase in HELD_AT:
            at = [victim] if victim.startswith("prefill") else ["prefill-0", "prefill-1"]
            before = {name: len(self.cluster.fired(name)) for name in at}
            for name in at:
                self.cluster.inject(name, {"point": HELD_AT[phase], "kind": "hang"})
            for name in at:
                proof = lambda name=name: len(self.cluster.fired(name)) > before[name]  # noqa: E731
                await assert_eventually(proof, within_s=10, what=f"a hold of {name} in {phase}")
        await assert_eventually(
            lambda: len(self.held(victim, phase)), lambda count: count >= HELD_MIN, within_s=10, what=f"{phase} legs"
        )

    async def busiest(self, role: str) -> str:
        """The worker of a role that decodes most streams, or has computed the prompts of most, once those are a few."""

        def most() -> tuple[int, str]:
            return max((len(self.held(worker.name)), worker.name) for worker in self.cluster.of_role(role))

        _, name = await assert_eventually(
            most, lambda found: found[0] >= HELD_MIN, within_s=10, what=f"streams of one {role} worker"
        )
        return name

    async def answered(self, count: int = FLOOR) -> None:
        """Return when so many requests that begin from now on have ended."""
        await self.load.wait_ended(count)


@asynccontextmanager
async def under_load(
    cluster: LegCluster,
    scenario: str,
    *,
    but: Callable[[Asked], bool] = lambda asked: False,
    doors: Sequence[str] = (),
    shape: Shape = SHAPE,
    kind: type[SteadyLoad] = SteadyLoad,
) -> AsyncIterator[RequestTrace]:
    """Run a scenario's block under a load; repair, end the load, judge and report.

    Args:
        cluster: where.
        scenario: its name in the report.
        but: names who may fail.
        doors: where clients come in; empty: at the frontends themselves.
        shape: of the load.
        kind: how its clients speak.
    """
    async with cluster.views() as views:
        cluster.release()
        await cluster.restore(views)
        async with (
            cluster.audited() as unaccounted,
            steady_load(doors or [frontend.address for frontend in cluster.frontends], shape, kind) as load,
        ):
            trace = RequestTrace(cluster, load)
            await trace.answered()
            begun_s = now_s()
            yield trace
            assert trace.fault_s, "void: no fault was brought in"
            cluster.release()
            await cluster.restore(views)
            trace.over_s = now_s()
            await trace.answered()
    await cluster.assert_idle()
    assert len(unaccounted) >= FLOOR, "void: the workers' memory was hardly looked at"
    assert not any(unaccounted), f"pages that are neither used nor cached nor free: {unaccounted}"
    history = load.history
    _judge(history, trace, but)
    report(scenario, results_of(history, trace.fault_s, detected_s(cluster, trace.fault_s)))
    assert begun_s < trace.fault_s < trace.over_s


def _judge(history: History, trace: RequestTrace, but: Callable[[Asked], bool]) -> None:
    one_ending_each(history)
    verdicts.none_failed(history, but=but)
    verdicts.tokens_are_exact(history, demo_answers)
    verdicts.is_large_enough(history.begun(0, trace.fault_s), FLOOR, "what came before the fault")
    verdicts.is_large_enough(history.begun(trace.fault_s, trace.over_s), FLOOR, "what came during the fault")
    verdicts.is_large_enough(history.begun(trace.over_s), FLOOR, "what came after the fault")


def one_ending_each(history: History) -> None:
    """Each stream ends once, with a finish or with an error, and no chunk is missing or comes twice."""
    wrong = history.where(
        lambda asked: asked.finish_count + (asked.failure is not None) != 1 or asked.misplaced_count > 0
    )
    assert not len(wrong), f"{len(wrong)} streams have no single ending:\n{wrong.lines()}"


def gaps_are_short(history: History, trace: RequestTrace, worker_id: str, within_s: float, least: int = 1) -> None:
    """Those the victim had at the fault had their next token within that time, from other workers or from itself."""
    had = history.running_at(trace.fault_s).served_by(worker_id)
    verdicts.is_large_enough(had, least, f"what {worker_id} had at the fault")
    late = had.where(lambda asked: (asked.gap_after_s(trace.fault_s) or 0.0) > within_s)
    gaps = [f"{asked.gap_after_s(trace.fault_s):.2f} s: {asked.summary()}" for asked in late.asked]
    assert not len(late), f"no token within {within_s} s:\n" + "\n".join(gaps)


def detected_s(cluster: FaultCluster, fault_s: float) -> float | None:
    """From the fault to the first leg that a frontend sent elsewhere after it, by the frontends' own logs."""
    wall_s = datetime.now(UTC).timestamp() - now_s() + fault_s
    times = [
        datetime.fromisoformat(found["time"]).timestamp() - wall_s
        for frontend in cluster.frontends
        for found in AGAIN.finditer(frontend.log.read_text())
    ]
    return min((time_s for time_s in times if time_s >= 0), default=None)
