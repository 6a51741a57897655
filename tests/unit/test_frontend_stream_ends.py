"""A stream that the frontend ends: its worker sends too many tokens, or the response has a defect."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.link_leg import Logprobs
from tandem_frontend.execution.request_stream import RetryingStream

from tandem.errors import TandemError
from tests.unit.support.scripted_legs import Gathered, ScriptedLeg, accepted, tokens
from tests.unit.test_frontend_continuation import KILLED, PROMPT, Fleet, answer, leg, stream


class Lavish(Fleet):
    """Workers that send more than max_tokens, and no finish."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self._at_once = at_once

    def send(self, route: Any, sent: Any, attempt: int, sinks: Any, *others: Any) -> Dispatched:
        whole = answer(tuple(sent.token_ids), sent.stopping.max_tokens + 5)
        words = [tokens(index, token) for index, token in enumerate(whole)]
        decode_leg = ScriptedLeg(accepted, *([tokens(0, *whole)] if self._at_once else words)).play(sinks[0])
        self.sent.append(Dispatched(route, attempt, attempt, decode_leg, ScriptedLeg(accepted).play(sinks[1])))
        return self.sent[-1]


@pytest.mark.parametrize("at_once", [True, False])
async def test_tokens_beyond_max_tokens_are_dropped(caplog: pytest.LogCaptureFixture, *, at_once: bool) -> None:
    """The client gets exactly max_tokens: that its worker goes on is not the client's failure."""
    fleet = Lavish(at_once=at_once)
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    (dispatched,) = fleet.sent
    for scripted in (dispatched.decode, dispatched.prefill):
        assert isinstance(scripted, ScriptedLeg)
        assert scripted.aborted.is_set()
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [
        f"request r: worker {dispatched.route.decode.worker_id} sent more than max_tokens (10); the rest is dropped"
    ]


class GivesUp(Gathered):
    """A sink that raises on a token; its worker may be lost in the same turn."""

    def __init__(self, after: int, *, loses_worker: bool) -> None:
        super().__init__()
        self.stream: RetryingStream
        self._after = after
        self._loses_worker = loses_worker

    def take(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        super().take(token_ids, logprobs)
        if len(self.token_ids) == self._after:
            self.stream.give_up(OverflowError("-1"))
            self.stream.give_up(KeyError("a second one"))
            if self._loses_worker:
                self.stream.attempt.lose(self.stream.attempt.route.decode, "it was started again")


@pytest.mark.parametrize("loses_worker", [False, True])
async def test_a_defect_in_a_response_fails_its_request_and_is_logged_once(
    caplog: pytest.LogCaptureFixture, *, loses_worker: bool
) -> None:
    fleet, got = Fleet(), GivesUp(3, loses_worker=loses_worker)
    async with fleet.attempts.accepted(leg(10), got, None) as got.stream:
        with pytest.raises(TandemError) as failed:
            await got.stream.run()
    assert (failed.value.reason, str(failed.value)) == ("INTERNAL", "internal error in a response: OverflowError")
    assert len(got.token_ids) == 3
    assert len(fleet.sent) == 1, "no other attempt is made at it"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["request r fails: defect while turning its tokens into a response"]


class Unending(Fleet):
    """Workers of which the second one accepts its leg and sends nothing more."""

    def send(self, route: Any, sent: Any, attempt: int, sinks: Any, *others: Any) -> Dispatched:
        if attempt == 1:
            return super().send(route, sent, attempt, sinks, *others)
        decode_leg, prefill_leg = ScriptedLeg(accepted).play(sinks[0]), ScriptedLeg(accepted).play(sinks[1])
        return Dispatched(route, attempt, attempt, decode_leg, prefill_leg)


async def test_a_stream_given_up_between_two_attempts_waits_for_neither() -> None:
    fleet, got = Unending(faults={1: (3, KILLED)}), Gathered()
    async with fleet.attempts.accepted(leg(10), got, None) as whole:

        class Pause(random.Random):
            def uniform(self, least: float, most: float) -> float:
                whole.give_up(OverflowError("-1"))
                return 0.0

        fleet.attempts.rng = Pause()
        with pytest.raises(TandemError, match="internal error in a response: OverflowError"):
            await asyncio.wait_for(whole.run(), 5)
    assert len(got.token_ids) == 3
