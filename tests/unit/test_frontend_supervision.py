"""Both legs of an attempt under every kind of failure, on scripted legs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from tandem_frontend.execution import attempt
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.link_leg import Logprobs, Sink
from tandem_frontend.routing.candidates import Route

from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest, LegFailed, ServiceError, StaleEpoch, TandemError
from tests.unit.support.frontend_workers import aggregated, decode, prefill
from tests.unit.support.scripted_legs import ABORTED, FINISH, ScriptedLeg, Word, accepted, fail, tokens, unresponsive

ROOM = 42
RESET = ServiceError("connection reset")


class Scene:
    """An attempt on scripted legs, and its tokens and outcome."""

    def __init__(self, decode_leg: ScriptedLeg, prefill_leg: ScriptedLeg | None, *, has_other: bool = True) -> None:
        self.decode_leg, self.prefill_leg = decode_leg, prefill_leg
        self.route = Route(decode(), prefill()) if prefill_leg else Route(aggregated(), None)
        self.attempt = Attempt(self.route, self)
        self.got: list[int] = []
        self.has_other = has_other

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        self.got += token_ids

    def is_replaceable(self, worker: Worker) -> bool:
        return self.has_other

    def send(self, sinks: tuple[Sink, Sink | None]) -> Dispatched:
        if self.prefill_leg is not None:
            assert sinks[1] is not None
            self.prefill_leg.play(sinks[1])
        room = ROOM if self.prefill_leg else 0
        return Dispatched(self.route, 1, room, self.decode_leg.play(sinks[0]), self.prefill_leg)

    async def run(self) -> list[int]:
        try:
            await self.attempt.start(self.send)
            await self.attempt.wait()
        finally:
            self.attempt.end()
        return self.got

    @property
    def are_aborted(self) -> bool:
        legs = [self.decode_leg] if self.prefill_leg is None else [self.decode_leg, self.prefill_leg]
        return all(leg.aborted.is_set() for leg in legs)


async def test_both_finishes_are_known_at_the_end() -> None:
    d, p = ScriptedLeg(accepted, tokens(0, 5), tokens(1, 6, 7), FINISH), ScriptedLeg(accepted, tokens(0, 5), FINISH)
    scene = Scene(d, p)
    assert await scene.run() == [5, 6, 7]
    assert scene.attempt.decode_finish is not None
    assert scene.attempt.prefill_finish is not None
    assert scene.are_aborted


async def test_aggregated_needs_no_prefill() -> None:
    scene = Scene(ScriptedLeg(accepted, tokens(0, 5), FINISH), None)
    assert await scene.run() == [5]
    assert scene.attempt.prefill_finish is None


async def test_tokens_may_arrive_before_the_leg_is_accepted() -> None:
    scene = Scene(
        ScriptedLeg(tokens(0, 5), accepted, tokens(1, 6), FINISH), ScriptedLeg(tokens(0, 5), FINISH, accepted)
    )
    assert await scene.run() == [5, 6]


@pytest.mark.parametrize(
    ("broken", "phase"),
    [([], "dispatched"), ([accepted], "bootstrapping"), ([accepted, tokens(0, 5)], "transferring")],
    ids=["dispatched", "bootstrapping", "transferring"],
)
async def test_a_failed_prefill_leg_aborts_decode(broken: list[Word], phase: str) -> None:
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(*broken, fail(RESET)))
    with pytest.raises(LegFailed) as failed:
        await asyncio.wait_for(scene.run(), 1)
    assert failed.value.metadata == {
        "leg": "prefill", "worker": "prefill-0", "phase": phase, "attempt": "1", "room": str(ROOM)
    }  # fmt: skip
    assert scene.are_aborted


@pytest.mark.parametrize(
    ("broken", "phase"),
    [([], "dispatched"), ([accepted], "bootstrapping"), ([accepted, tokens(0, 5)], "decoding")],
    ids=["dispatched", "bootstrapping", "decode"],
)
async def test_a_failed_decode_leg_aborts_prefill(broken: list[Word], phase: str) -> None:
    scene = Scene(ScriptedLeg(*broken, fail(RESET)), ScriptedLeg(accepted))
    with pytest.raises(LegFailed) as failed:
        await asyncio.wait_for(scene.run(), 1)
    assert failed.value.metadata["leg"] == "decode"
    assert failed.value.metadata["phase"] == phase
    assert scene.are_aborted


async def test_a_prefill_leg_may_fail_after_decodes_first_token() -> None:
    p = ScriptedLeg(accepted, tokens(0, 5))
    d = ScriptedLeg(accepted, tokens(0, 5), lambda sink: p.say(fail(RESET)), tokens(1, 6), FINISH)
    scene = Scene(d, p)
    assert await scene.run() == [5, 6]
    assert scene.attempt.decode_finish is not None


PEER_ABORTED = LegFailed("aborted by decode", cause=LegFailed.PEER_ABORTED)


async def test_prefill_aborted_by_its_peer_waits_for_decodes_own_end() -> None:
    d = ScriptedLeg(accepted)
    p = ScriptedLeg(accepted, fail(PEER_ABORTED), lambda sink: d.say(ABORTED))
    scene = Scene(d, p)
    assert await scene.run() == []
    assert scene.attempt.decode_finish is not None
    assert scene.attempt.faulty_worker is None


async def test_prefill_aborted_by_its_peer_fails_where_decode_reports_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "DECODE_END_TIMEOUT_S", 0.01)
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(accepted, fail(PEER_ABORTED)))
    with pytest.raises(LegFailed, match="aborted by decode"):
        await asyncio.wait_for(scene.run(), 1)
    assert scene.are_aborted


async def test_the_wait_for_prefills_finish_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PREFILL_FINISH_TIMEOUT_S", 0.01)
    scene = Scene(ScriptedLeg(accepted, tokens(0, 5), FINISH), ScriptedLeg(accepted, tokens(0, 5)))
    assert await scene.run() == [5]
    assert scene.attempt.prefill_finish is None


class StopScene(Scene):
    """A response that ends by itself at its first token, as at a stop string."""

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        super().tokens(token_ids, logprobs)
        self.attempt.no_more_tokens()


async def test_a_response_that_ends_before_its_legs_waits_for_prefills_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PREFILL_FINISH_TIMEOUT_S", 60.0)
    decode_leg, prefill_leg = ScriptedLeg(accepted, tokens(0, 5), tokens(1, 6), FINISH), ScriptedLeg(accepted)
    scene = StopScene(decode_leg, prefill_leg)
    running = asyncio.create_task(scene.run())
    await asyncio.wait_for(decode_leg.aborted.wait(), 5)
    assert not running.done()
    prefill_leg.say(FINISH)
    assert await asyncio.wait_for(running, 5) == [5]
    assert scene.attempt.prefill_finish is not None


async def test_a_response_that_ends_before_its_legs_does_not_wait_for_a_failed_prefill_leg(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "PREFILL_FINISH_TIMEOUT_S", 60.0)
    scene = StopScene(ScriptedLeg(accepted, tokens(0, 5)), ScriptedLeg(accepted))
    running = asyncio.create_task(scene.run())
    await asyncio.wait_for(scene.decode_leg.aborted.wait(), 5)
    assert scene.prefill_leg is not None
    scene.prefill_leg.say(fail(RESET))
    assert await asyncio.wait_for(running, 5) == [5]


@pytest.mark.parametrize("has_prefill", [False, True])
async def test_a_response_that_ends_before_its_legs_waits_for_prefills_usage_with_a_timeout(
    monkeypatch: pytest.MonkeyPatch, *, has_prefill: bool
) -> None:
    monkeypatch.setattr(attempt, "PREFILL_FINISH_TIMEOUT_S", 0.01 if has_prefill else 60.0)
    scene = StopScene(ScriptedLeg(accepted, tokens(0, 5)), ScriptedLeg(accepted) if has_prefill else None)
    assert await asyncio.wait_for(scene.run(), 5) == [5]


async def test_an_unresponsive_worker_fails_where_another_can_take_over() -> None:
    scene = Scene(ScriptedLeg(accepted, unresponsive), ScriptedLeg(accepted))
    with pytest.raises(LegFailed, match="worker is unresponsive"):
        await scene.run()
    assert scene.attempt.failed_worker == decode()


async def test_an_unresponsive_worker_keeps_its_leg_where_there_is_no_other() -> None:
    d = ScriptedLeg(accepted, unresponsive, tokens(0, 5), FINISH)
    scene = Scene(d, None, has_other=False)
    assert await scene.run() == [5]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_known_to_be_gone_ends_the_attempt_at_once(role: str) -> None:
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(accepted))
    running = asyncio.create_task(scene.run())
    await asyncio.wait_for(asyncio.shield(scene.attempt._accepted), 1)
    scene.attempt.lose(decode() if role == "decode" else prefill(), "started again")
    with pytest.raises(LegFailed, match="started again") as failed:
        await asyncio.wait_for(running, 1)
    assert failed.value.metadata["leg"] == role
    assert scene.attempt.failed_worker == (decode() if role == "decode" else prefill())


async def test_an_invalid_request_is_the_clients_error_and_not_the_legs() -> None:
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(accepted, fail(InvalidRequest("token_ids", "is too long"))))
    with pytest.raises(InvalidRequest) as refused:
        await scene.run()
    assert refused.value.field == "token_ids"


async def test_a_restarted_worker_is_the_legs_failure() -> None:
    stale = StaleEpoch("another epoch", worker="decode-0", expected=7, actual=8)
    with pytest.raises(LegFailed) as failed:
        await Scene(ScriptedLeg(fail(stale)), ScriptedLeg(accepted)).run()
    assert failed.value.metadata["actual"] == "8"
    assert failed.value.metadata["phase"] == "dispatched"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (tokens(2, 6), "tokens at index 2, expected index 1"),
        (tokens(0, 5), "tokens at index 0, expected index 1"),
        (tokens(1), "received 0 tokens at index 1"),
        (tokens(1, 1000), "token id 1000 is outside the vocabulary"),
    ],
    ids=["gap", "again", "none", "vocabulary"],
)
async def test_a_malformed_step_is_a_failure(wrong: Word, sentence: str) -> None:
    scene = Scene(ScriptedLeg(accepted, tokens(0, 5), wrong, FINISH), None)
    with pytest.raises(LegFailed, match=sentence):
        await scene.run()
    assert scene.got == [5], "nothing of it reaches the client"


async def test_an_aborted_prefill_leg_ends_the_attempt() -> None:
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(accepted, ABORTED))
    with pytest.raises(TandemError, match="aborted") as failed:
        await asyncio.wait_for(scene.run(), 1)
    assert failed.value.reason == "ABORTED"


async def test_an_early_end_aborts_both_legs() -> None:
    d = ScriptedLeg(accepted, tokens(0, 5))
    scene = Scene(d, ScriptedLeg(accepted))
    d.say(lambda sink: scene.attempt.stop())
    assert await scene.run() == [5]
    assert scene.are_aborted


async def test_an_ended_attempt_passes_no_event_on() -> None:
    d = ScriptedLeg(accepted)
    scene = Scene(d, None)
    scene.attempt.end()
    for word in (accepted, tokens(0, 5), FINISH, fail(RESET)):
        word(scene.attempt._decode)
    assert scene.got == []
    assert scene.attempt.failed_worker is None


async def test_cancelling_its_task_is_no_failure_of_a_leg() -> None:
    scene = Scene(ScriptedLeg(accepted), ScriptedLeg(accepted))
    running: asyncio.Task[Any] = asyncio.create_task(scene.run())
    await asyncio.wait_for(asyncio.shield(scene.attempt._accepted), 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert scene.are_aborted
    assert scene.attempt.failed_worker is None
