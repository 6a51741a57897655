"""Retries of legs that a worker does not accept, on scripted calls."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.execution.dispatch import Dispatch, Dispatched
from tandem_frontend.execution.link_leg import Sink
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import AVOIDED_S, RecentRefusals, Routes

from tandem.api.types.v1 import leg_pb2
from tandem.clock import ManualClock
from tandem.domain.worker import Start, Worker
from tandem.errors import (
    DeadlinePassed,
    Draining,
    InvalidRequest,
    LegFailed,
    NoWorkers,
    Overloaded,
    RequestAborted,
    ServiceError,
    StaleEpoch,
    TandemError,
)
from tandem.observability.trace_context import Headers
from tests.unit.support.frontend_workers import CAPABILITIES, aggregated, decode, prefill
from tests.unit.support.scripted_legs import Gathered, ScriptedLeg, accepted, fail, unresponsive

REFUSED = ServiceError("connection refused")
TOKENIZER = SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)
LEG = leg_pb2.LegRequest(request_id="r")


class ScriptedDispatch:
    """Sends nothing: a leg is accepted at once, unless its worker has a scripted response, or none at all."""

    def __init__(self) -> None:
        self.answers: dict[str, TandemError] = {}
        self.frozen: set[str] = set()
        """Workers that answer nothing."""
        self.sent: list[Dispatched] = []
        self.timeouts_s: list[float | None] = []
        self.on_send: Callable[[], None] = lambda: None

    def send(
        self,
        route: Route,
        leg: leg_pb2.LegRequest,
        attempt: int,
        sinks: tuple[Sink, Sink | None],
        timeout_s: float | None,
        headers: Headers = (),
    ) -> Dispatched:
        self.on_send()
        prefill_leg = None if route.prefill is None else self.leg(route.prefill.worker_id, sinks[1])
        decode_leg = self.leg(route.decode.worker_id, sinks[0])
        dispatched = Dispatched(route, attempt, len(self.sent) + 1 if prefill_leg else 0, decode_leg, prefill_leg)
        self.sent.append(dispatched)
        self.timeouts_s.append(timeout_s)
        return dispatched

    def leg(self, worker_id: str, sink: Sink | None) -> ScriptedLeg:
        assert sink is not None
        if worker_id in self.frozen:
            return ScriptedLeg(unresponsive).play(sink)
        answer = self.answers.get(worker_id)
        return ScriptedLeg(accepted if answer is None else fail(answer)).play(sink)

    def tried(self, number: int) -> set[str]:
        return {worker.worker_id for worker in self.sent[number].route.workers}


class Scene:
    def __init__(self, *workers: Worker) -> None:
        self.workers = workers
        self.clock = ManualClock(100.0)
        self.dispatch = ScriptedDispatch()
        refusals = RecentRefusals(self.clock)
        breakers = self.breakers = CircuitBreakers(self.clock, random.Random(7))
        model = ServedModel("m", cast("Any", TOKENIZER), {})
        self.unhealthy: set[Start] = set()
        routes = Routes(model, lambda: self.workers, lambda: self.unhealthy, refusals, breakers, random.Random(7))
        dispatch = cast("Dispatch", self.dispatch)
        self.attempts = ExecutionDeps(routes, refusals, breakers, dispatch, self.clock, random.Random(7))

    async def take(self, timeout_s: float | None = None) -> Dispatched:
        async with self.attempts.accepted(LEG, Gathered(), timeout_s):
            return self.dispatch.sent[-1]


def pairs(prefills: int, decodes: int) -> Scene:
    return Scene(
        *(prefill(f"prefill-{number}") for number in range(prefills)),
        *(decode(f"decode-{number}") for number in range(decodes)),
    )


@pytest.mark.parametrize(
    "refusal",
    [
        *[REFUSED, Draining("going"), Overloaded("full"), StaleEpoch("restarted"), LegFailed("no answer")],
        TandemError("INTERNAL: a defect of that worker"),
    ],
    ids=lambda refusal: type(refusal).__name__,
)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_refused_leg_is_retried_elsewhere(refusal: TandemError, role: str) -> None:
    scene = pairs(2, 2)
    scene.dispatch.answers = {f"{role}-0": refusal}
    while len(scene.dispatch.sent) < 2:
        # Until the draw meets the worker that refuses.
        scene.dispatch.sent.clear()
        taken = await scene.take()
    first, second = scene.dispatch.sent
    assert taken is second
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.room != second.room
    assert not scene.dispatch.tried(0) & scene.dispatch.tried(1), "no worker twice while another is there"
    for leg in (first.prefill, first.decode):
        assert cast("ScriptedLeg", leg).aborted.is_set()


async def test_a_worker_without_alternative_is_tried_again_beside_another() -> None:
    scene = pairs(1, 2)
    scene.dispatch.answers = {"decode-0": REFUSED}
    routes = []
    for _ in range(20):
        scene.clock.advance(AVOIDED_S)
        routes.append((await scene.take()).route)
    assert {route.decode.worker_id for route in routes} == {"decode-1"}
    assert len(scene.dispatch.sent) > 20, "the other one was met and left"


async def test_a_request_has_three_attempts_at_most() -> None:
    scene = pairs(5, 5)
    scene.dispatch.answers = {f"decode-{number}": REFUSED for number in range(5)}
    with pytest.raises(LegFailed) as failed:
        await scene.take()
    assert failed.value.metadata["attempt"] == "3"
    assert len(scene.dispatch.sent) == 3
    assert len({dispatched.route.decode for dispatched in scene.dispatch.sent}) == 3


async def test_without_another_worker_there_is_one_attempt() -> None:
    scene = pairs(1, 1)
    scene.dispatch.answers = {"decode-0": REFUSED}
    with pytest.raises(LegFailed, match="connection refused"):
        await scene.take()
    assert len(scene.dispatch.sent) == 1


async def test_an_aggregated_worker_is_an_alternative() -> None:
    scene = Scene(prefill(), decode(), aggregated())
    scene.dispatch.answers = {"prefill-0": REFUSED}
    for _ in range(10):
        scene.clock.advance(AVOIDED_S)
        assert (await scene.take()).route.decode.worker_id == "aggregated-0"
    assert len(scene.dispatch.sent) > 10


@pytest.mark.parametrize(
    "failure",
    [InvalidRequest("token_ids", "too long"), DeadlinePassed("late"), RequestAborted("asked for")],
    ids=lambda failure: type(failure).__name__,
)
async def test_an_error_of_the_request_is_not_retried(failure: TandemError) -> None:
    scene = pairs(2, 2)
    scene.dispatch.answers = {f"decode-{number}": failure for number in range(2)}
    with pytest.raises(TandemError):
        await scene.take()
    assert len(scene.dispatch.sent) == 1


async def test_a_refusing_worker_is_avoided_for_a_while() -> None:
    scene = pairs(1, 2)
    scene.dispatch.answers = {"decode-0": REFUSED}
    while len(scene.dispatch.sent) < 2:
        scene.dispatch.sent.clear()
        await scene.take()
    scene.dispatch.sent.clear()
    scene.dispatch.answers.clear()
    scene.clock.advance(AVOIDED_S * 0.9)
    for _ in range(20):
        assert (await scene.take()).route.decode.worker_id == "decode-1"
    scene.clock.advance(AVOIDED_S * 0.2)
    assert {(await scene.take()).route.decode.worker_id for _ in range(20)} == {"decode-0", "decode-1"}


@pytest.mark.parametrize(
    ("refusal", "counts"),
    [
        (REFUSED, True),
        (LegFailed("no answer"), True),
        (TandemError("INTERNAL: a defect of that worker"), True),
        (Overloaded("full"), False),
        (Draining("going"), False),
        (StaleEpoch("restarted"), False),
        (InvalidRequest("token_ids", "too long"), False),
        (DeadlinePassed("late"), False),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_only_its_own_faults_open_the_breaker_of_a_worker(refusal: TandemError, counts: bool) -> None:
    scene = pairs(1, 2)
    scene.breakers.follow(scene.workers)
    scene.dispatch.answers = {"decode-0": refusal}
    for _ in range(60):
        scene.clock.advance(AVOIDED_S + 0.1)
        with contextlib.suppress(TandemError):
            async with scene.attempts.accepted(LEG, Gathered(), None) as stream:
                # As if its tokens had come.
                stream._note_first_token()
    assert set(scene.breakers.states()) == ({("decode-0", 7)} if counts else set())


async def test_a_restarted_worker_counts_as_another() -> None:
    """A restart that the registry has reported meanwhile is used within the same request."""
    scene = pairs(1, 1)
    scene.dispatch.answers = {"decode-0": StaleEpoch("restarted")}

    def restart() -> None:
        if scene.dispatch.sent:
            scene.dispatch.answers.clear()
        else:
            p, d = scene.workers
            scene.workers = (p, replace(d, epoch=d.epoch + 1))

    scene.dispatch.on_send = restart
    assert (await scene.take()).route.decode.epoch == decode().epoch + 1
    assert len(scene.dispatch.sent) == 2


async def test_without_any_worker_left_the_first_failure_is_reported() -> None:
    scene = pairs(2, 2)
    scene.dispatch.answers = {f"decode-{number}": REFUSED for number in range(2)}
    scene.dispatch.on_send = lambda: setattr(scene, "workers", ())
    with pytest.raises(LegFailed):
        await scene.take()
    with pytest.raises(NoWorkers):
        await scene.take()


async def test_attempts_share_the_clients_deadline() -> None:
    scene = pairs(2, 2)
    scene.dispatch.answers = {f"decode-{number}": REFUSED for number in range(2)}
    scene.dispatch.on_send = lambda: scene.clock.advance(2)
    with pytest.raises(LegFailed):
        await scene.take(timeout_s=3.0)
    assert scene.dispatch.timeouts_s == [3.0, 1.0]


async def test_an_unhealthy_worker_is_avoided_but_not_excluded() -> None:
    scene = pairs(2, 2)
    scene.unhealthy = {("decode-0", 7), ("prefill-1", 7)}
    for _ in range(20):
        assert {worker.worker_id for worker in (await scene.take()).route.workers} == {"prefill-0", "decode-1"}
    scene.unhealthy |= {("decode-1", 7), ("prefill-0", 7)}
    routes = [(await scene.take()).route for _ in range(40)]
    assert {worker.worker_id for route in routes for worker in route.workers} >= {"decode-0", "decode-1", "prefill-1"}


async def test_a_leg_does_not_wait_for_an_unresponsive_worker() -> None:
    scene = pairs(1, 2)
    scene.dispatch.frozen = {"decode-0"}
    while len(scene.dispatch.sent) < 2:
        scene.dispatch.sent.clear()
        assert (await scene.take()).route.decode.worker_id == "decode-1"
    assert scene.dispatch.sent[0].route.decode.worker_id == "decode-0"


async def _slow_then_broken(scene: Scene, *, is_unhealthy: bool) -> Dispatched:
    """A request that decode-0 does not answer at first, and that decode-1 fails; decode-0 serves from then on."""

    def before_second_attempt() -> None:
        if len(scene.dispatch.sent) == 1:
            scene.dispatch.frozen = set()
            scene.dispatch.answers = {"decode-1": LegFailed("the engine died")}
            scene.unhealthy = {("decode-0", 7)} if is_unhealthy else set()

    # The first attempt goes to decode-0.
    scene.unhealthy = {("decode-1", 7)}
    scene.dispatch.frozen = {"decode-0"}
    scene.dispatch.on_send = before_second_attempt
    return await scene.take()


async def test_attempts_where_all_others_failed_return_to_a_worker_that_was_slow() -> None:
    scene = pairs(1, 2)
    taken = await _slow_then_broken(scene, is_unhealthy=False)
    assert [sent.route.decode.worker_id for sent in scene.dispatch.sent] == ["decode-0", "decode-1", "decode-0"]
    assert taken is scene.dispatch.sent[-1]


async def test_attempts_where_all_others_failed_do_not_return_to_a_worker_that_is_still_silent() -> None:
    scene = pairs(1, 2)
    with pytest.raises(LegFailed, match="the engine died"):
        await _slow_then_broken(scene, is_unhealthy=True)
    assert len(scene.dispatch.sent) == 2


async def test_a_request_without_another_route_waits_for_a_frozen_worker() -> None:
    scene = pairs(1, 1)
    scene.dispatch.frozen = {"decode-0"}
    taking = asyncio.create_task(scene.take())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not taking.done()
    cast("ScriptedLeg", scene.dispatch.sent[0].decode).say(accepted)
    assert (await taking).attempt == 1


async def test_an_ejected_worker_gets_no_request_while_there_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = pairs(1, 2)
    monkeypatch.setattr(scene.breakers, "ejected", lambda: {("decode-0", 7)})
    assert {(await scene.take()).route.decode.worker_id for _ in range(20)} == {"decode-1"}
    scene.workers = scene.workers[:2]
    assert (await scene.take()).route.decode.worker_id == "decode-0", "avoided, never excluded"
