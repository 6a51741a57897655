"""Requests that find no worker wait for the next view, within bounds."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.execution.request_stream import GONE_MAX, ExecutionDeps
from tandem_frontend.execution.view_wait import MissingWorkers, ViewWait
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes

from tandem.api.types.v1 import leg_pb2
from tandem.clock import ManualClock, monotonic
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import DeadlinePassed, Draining, LegFailed, NoWorkers, Overloaded, ServiceError, StaleEpoch
from tests.unit.support.frontend_workers import CAPABILITIES, decode, prefill
from tests.unit.support.scripted_legs import Gathered
from tests.unit.test_frontend_attempts import ScriptedDispatch

LEG = leg_pb2.LegRequest(request_id="r")
WAIT_S = 30.0
"""Longer than any test: one that returns was woken."""
SHORT_S = 0.05


class Scene:
    """A frontend that follows the views of the test."""

    def __init__(self, *workers: Worker, wait_s: float = WAIT_S) -> None:
        self.workers: tuple[Worker, ...] = ()
        self.dispatch = ScriptedDispatch()
        refusals = RecentRefusals(monotonic)
        breakers = CircuitBreakers(monotonic, random.Random(7))
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        self.routes = Routes(model, lambda: self.workers, tuple, refusals, breakers, random.Random(7))
        self.attempts = ExecutionDeps(
            self.routes, refusals, breakers, cast("Any", self.dispatch), monotonic, random.Random(7),
            no_worker_wait_s=wait_s,
        )  # fmt: skip
        if workers:
            self.view(*workers)

    def view(self, *workers: Worker) -> None:
        self.workers = workers
        self.routes.follow(workers)
        self.attempts.notice(workers)

    async def take(self, timeout_s: float | None = None) -> set[tuple[str, int]]:
        """The workers, with their epochs, that accept a request."""
        async with self.attempts.accepted(LEG, Gathered(), timeout_s):
            return {worker.start for worker in self.dispatch.sent[-1].route.workers}

    async def begin(self, timeout_s: float | None = None) -> asyncio.Task[set[tuple[str, int]]]:
        """A request that waits; its retries pause for up to 50 ms."""
        task = asyncio.create_task(self.take(timeout_s))
        async with asyncio.timeout(5):
            while not self.waiting_count and not task.done():  # noqa: ASYNC110 -- nothing to await: both may happen
                await asyncio.sleep(0.001)
        return task

    @property
    def waiting_count(self) -> int:
        event = self.attempts.missing._next_view
        return len(cast("Any", event)._waiters)


def started_again(worker: Worker) -> Worker:
    return replace(worker, epoch=worker.epoch + 1)


P, D = prefill("prefill-0"), decode("decode-0")


async def test_a_request_waits_for_the_successor_of_a_worker_that_left() -> None:
    scene = Scene(P, D)
    scene.view(D)
    waiting = await scene.begin()
    assert not waiting.done()
    scene.view(D, decode("decode-1"))
    await asyncio.sleep(0)
    assert not waiting.done(), "that view does not help it"
    scene.view(D, started_again(P))
    assert await waiting == {started_again(P).start, D.start}


async def test_a_request_waits_while_the_only_worker_drains() -> None:
    scene = Scene(P, D)
    scene.view(replace(P, state=WorkerState.DRAINING), D)
    waiting = await scene.begin()
    scene.view(started_again(P), D)
    assert started_again(P).start in await waiting


@pytest.mark.parametrize("refusal", [Draining("going"), StaleEpoch("restarted")], ids=["draining", "stale"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_waits_where_all_workers_have_gone_and_the_view_is_behind(
    role: str, refusal: ServiceError
) -> None:
    workers = prefill("prefill-0"), prefill("prefill-1"), decode("decode-0"), decode("decode-1")
    scene = Scene(*workers)
    gone = {f"{role}-0": StaleEpoch("restarted"), f"{role}-1": refusal}
    scene.dispatch.answers = dict(gone)
    waiting = await scene.begin()
    assert len(scene.dispatch.sent) == 2
    del scene.dispatch.answers[f"{role}-0"]
    scene.view(*(started_again(worker) if worker.worker_id == f"{role}-0" else worker for worker in workers))
    assert (f"{role}-0", workers[0].epoch + 1) in await waiting


async def test_a_frontend_that_never_had_a_route_refuses_at_once() -> None:
    for workers in ((), (D,)):
        scene = Scene()
        scene.view(*workers)
        with pytest.raises(NoWorkers) as refused:
            await scene.take()
        assert "waited_s" not in refused.value.metadata


async def test_the_error_after_a_wait_names_it() -> None:
    scene = Scene(P, D, wait_s=SHORT_S)
    scene.view(D)
    with pytest.raises(NoWorkers, match=r"no worker registered within 0\.\d s \(no_worker_wait_s\)") as refused:
        await scene.take()
    assert refused.value.metadata["waited_s"] in {"0.0", "0.1"}
    assert refused.value.metadata["role"] == "prefill"


async def test_the_error_of_an_attempt_after_a_wait_names_it() -> None:
    scene = Scene(P, D, wait_s=SHORT_S)
    scene.dispatch.answers = {"prefill-0": StaleEpoch("restarted")}
    with pytest.raises(LegFailed, match="no worker registered within") as refused:
        await scene.take()
    assert refused.value.metadata["worker"] == "prefill-0"
    assert "waited_s" in refused.value.metadata


async def test_all_requests_wait_until_the_same_moment() -> None:
    """In a long outage the first ones have waited, and the next are refused at once."""
    scene = Scene(P, D, wait_s=SHORT_S)
    scene.dispatch.answers = {"prefill-0": StaleEpoch("restarted")}
    with pytest.raises(LegFailed, match="no worker registered"):
        await scene.take()
    with pytest.raises(LegFailed) as refused:
        await scene.take()
    assert "waited_s" not in refused.value.metadata
    scene.dispatch.answers = {}
    await scene.take()
    scene.dispatch.answers = {"prefill-0": StaleEpoch("restarted")}
    with pytest.raises(LegFailed, match="no worker registered"):
        await scene.take()


async def test_the_deadline_ends_a_wait() -> None:
    scene = Scene(P, D)
    scene.view(D)
    with pytest.raises(DeadlinePassed, match="waited for a worker"):
        await scene.take(timeout_s=SHORT_S)


async def test_a_cancelled_request_leaves_the_wait() -> None:
    scene = Scene(P, D)
    scene.view(D)
    waiting = await scene.begin()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert scene.waiting_count == 0


@pytest.mark.parametrize(
    "failure", [ServiceError("connection refused"), Overloaded("full")], ids=["unreachable", "overloaded"]
)
async def test_a_worker_that_fails_otherwise_is_not_waited_for(failure: ServiceError) -> None:
    scene = Scene(P, D)
    scene.dispatch.answers = {"prefill-0": failure}
    with pytest.raises(type(failure) if isinstance(failure, Overloaded) else LegFailed):
        await scene.take()
    assert len(scene.dispatch.sent) == 1


async def test_a_full_worker_beside_one_that_has_gone_is_an_overload() -> None:
    scene = Scene(P, prefill("prefill-1"), D)
    scene.dispatch.answers = {"prefill-0": StaleEpoch("restarted"), "prefill-1": Overloaded("full")}
    while True:
        scene.dispatch.sent.clear()
        taking = await scene.begin()
        if "prefill-0" in scene.dispatch.tried(0):
            with pytest.raises(Overloaded):
                await taking
            return
        # The other order waits: the last refusal says that a successor comes.
        taking.cancel()


async def test_refusals_of_workers_that_have_gone_are_no_attempts() -> None:
    prefills = [prefill(f"prefill-{number}") for number in range(6)]
    scene = Scene(*prefills, D)
    scene.dispatch.answers = {worker.worker_id: StaleEpoch("restarted") for worker in prefills[1:]}
    assert await scene.take() == {prefills[0].start, D.start}


async def test_refusals_of_workers_that_have_gone_end() -> None:
    prefills = [prefill(f"prefill-{number}") for number in range(GONE_MAX + 9)]
    scene = Scene(*prefills, D, wait_s=0)
    scene.dispatch.answers = {worker.worker_id: Draining("going") for worker in prefills}
    with pytest.raises(LegFailed):
        await scene.take()
    assert len(scene.dispatch.sent) == GONE_MAX + 3


async def test_a_view_that_changes_again_and_again_does_not_lengthen_a_wait() -> None:
    clock = ManualClock(100.0)
    missing = MissingWorkers(clock, 5.0)
    missing.follow(has_route=True)
    wait = ViewWait(missing)
    for _ in range(2):
        waiting = asyncio.create_task(wait.next_view(None))
        await asyncio.sleep(0)
        clock.advance(2.5)
        missing.follow(has_route=True)
        assert await waiting
    assert not await wait.next_view(None)
    wait.reset()
    waiting = asyncio.create_task(wait.next_view(None))
    await asyncio.sleep(0)
    missing.follow(has_route=True)
    assert await waiting


async def test_a_role_that_comes_and_goes_is_missed_from_its_last_moment() -> None:
    clock = ManualClock(100.0)
    missing = MissingWorkers(clock, 5.0)
    missing.follow(has_route=True)
    missing.follow(has_route=False)
    clock.advance(4.0)
    missing.follow(has_route=False)
    assert missing.left_s() == pytest.approx(1.0)
    missing.served()
    assert missing.left_s() == pytest.approx(1.0), "a stream that was accepted before proves nothing"
    missing.follow(has_route=True)
    missing.follow(has_route=False)
    assert missing.left_s() == pytest.approx(5.0)
