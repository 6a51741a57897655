"""Orders of events that broke promises of attempts once, in scripted order on virtual time."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.link_leg import Sink
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.domain.worker import Worker
from tandem.errors import DeadlinePassed, LegFailed, ServiceError
from tandem.observability.trace_context import Headers
from tandem.testing.virtual_time import run_virtually
from tests.faults.support.leg_world import CAPABILITIES, fleet, now_s
from tests.unit.support.scripted_legs import (
    ABORTED,
    FINISH,
    Gathered,
    ScriptedLeg,
    accepted,
    fail,
    tokens,
    unresponsive,
)

LEG = leg_pb2.LegRequest(request_id="r", token_ids=[1, 2, 3], stopping=sampling_pb2.Stopping(max_tokens=4))


class Scripted:
    """Stands for Dispatch: each attempt meets the next pair of legs, decode's first."""

    def __init__(self, workers: tuple[Worker, ...], *legs: tuple[ScriptedLeg, ScriptedLeg]) -> None:
        self.legs = legs
        self.sent: list[Route] = []
        refusals = RecentRefusals(now_s)
        breakers = CircuitBreakers(now_s, random.Random(3))
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        routes = Routes(model, lambda: workers, tuple, refusals, breakers, random.Random(3))
        self.attempts = ExecutionDeps(routes, refusals, breakers, cast("Any", self), now_s, random.Random(4))

    def send(
        self,
        route: Route,
        leg: leg_pb2.LegRequest,
        attempt: int,
        sinks: tuple[Sink, Sink | None],
        timeout_s: float | None,
        headers: Headers = (),
    ) -> Dispatched:
        decode, prefill = self.legs[len(self.sent)]
        self.sent.append(route)
        assert sinks[1] is not None
        return Dispatched(route, attempt, attempt, decode.play(sinks[0]), prefill.play(sinks[1]))

    async def stream(self) -> list[int]:
        got = Gathered()
        async with self.attempts.accepted(LEG, got, None) as whole:
            await whole.run()
        return got.token_ids


def test_a_leg_that_breaks_before_the_other_one_is_taken_is_sent_elsewhere() -> None:
    async def live() -> None:
        scripted = Scripted(
            fleet(2, 2, CAPABILITIES),
            (ScriptedLeg(), ScriptedLeg(accepted, fail(LegFailed("no peer came to the room")))),
            (ScriptedLeg(accepted, tokens(0, 5, 6, 7, 8), FINISH), ScriptedLeg(accepted, FINISH)),
        )
        assert await scripted.stream() == [5, 6, 7, 8]
        first, second = scripted.sent
        assert first.prefill != second.prefill

    run_virtually(live())


def test_a_prefill_leg_that_fails_after_the_hand_over_is_not_blamed_for_what_decode_does_later() -> None:
    async def live() -> None:
        decode, prefill = ScriptedLeg(accepted, tokens(0, 5)), ScriptedLeg(accepted)
        scripted = Scripted(fleet(2, 1, CAPABILITIES), (decode, prefill))
        streaming = asyncio.create_task(scripted.stream())
        await asyncio.sleep(0.1)
        prefill.say(fail(ServiceError("connection reset")))
        await asyncio.sleep(0.1)
        assert not streaming.done(), "the KV is there: prefill is not needed any more"
        decode.say(fail(ServiceError("connection reset")))
        with pytest.raises(LegFailed) as failed:
            await streaming
        assert failed.value.metadata["worker"] == "decode-0"
        assert failed.value.metadata["continuation"] == "workers"
        assert len(scripted.sent) == 1, "the worker on which it broke got it again"

    run_virtually(live())


def test_a_decode_leg_that_was_aborted_does_not_wait_for_its_prefill_leg() -> None:
    async def live() -> None:
        prefill = ScriptedLeg(accepted)
        scripted = Scripted(fleet(1, 1, CAPABILITIES), (ScriptedLeg(accepted, ABORTED), prefill))
        assert await scripted.stream() == []
        assert prefill.aborted.is_set()
        assert now_s() < 0.1, "the prefill engine holds the request for the peer that waits"

    run_virtually(live())


def test_a_deadline_in_a_later_attempt_is_reported_as_deadline() -> None:
    async def live() -> None:
        scripted = Scripted(
            fleet(2, 2, CAPABILITIES),
            (
                ScriptedLeg(accepted, tokens(0, 5), fail(ServiceError("connection reset"))),
                ScriptedLeg(accepted, FINISH),
            ),
            (ScriptedLeg(fail(DeadlinePassed("the deadline has passed"))), ScriptedLeg(accepted)),
        )
        with pytest.raises(DeadlinePassed):
            await scripted.stream()
        assert len(scripted.sent) == 2

    run_virtually(live())


def test_a_newer_start_of_a_worker_ends_what_its_former_one_still_holds_open() -> None:
    async def live() -> None:
        workers = fleet(2, 2, CAPABILITIES)
        scripted = Scripted(
            workers,
            (ScriptedLeg(accepted, tokens(0, 5)), ScriptedLeg(accepted, FINISH)),
            (ScriptedLeg(accepted, tokens(0, 6, 7, 8), FINISH), ScriptedLeg(accepted, FINISH)),
        )
        streaming = asyncio.create_task(scripted.stream())
        await asyncio.sleep(0.1)
        # As after a machine's loss: nothing ends the connection to the process that is gone.
        gone = scripted.sent[0].decode
        newer = replace(gone, epoch=gone.epoch + 1)
        scripted.attempts.notice(newer if worker == gone else worker for worker in workers)
        assert await streaming == [5, 6, 7, 8]
        assert now_s() < 0.2, "it was only noticed by its silence"

    run_virtually(live())


def test_a_worker_that_was_slow_gets_its_stream_back_once_all_others_failed_and_keeps_it() -> None:
    async def live() -> None:
        scripted = Scripted(
            fleet(1, 2, CAPABILITIES),
            (ScriptedLeg(accepted, tokens(0, 5), unresponsive), ScriptedLeg(accepted, FINISH)),
            (ScriptedLeg(accepted, tokens(0, 6), fail(ServiceError("reset"))), ScriptedLeg(accepted, FINISH)),
            (ScriptedLeg(accepted, unresponsive, tokens(0, 7, 8), FINISH), ScriptedLeg(accepted, FINISH)),
        )
        assert await scripted.stream() == [5, 6, 7, 8]
        slow, other, again = (route.decode.worker_id for route in scripted.sent)
        assert slow == again != other

    run_virtually(live())
