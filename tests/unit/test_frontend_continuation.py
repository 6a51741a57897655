"""What becomes of a client's stream when legs break in it, on calls that are played."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from frontend_workers import CAPABILITIES, decode, prefill
from hypothesis import given
from hypothesis import strategies as st
from played_calls import ACCEPTED, PlayedCall
from tandem_frontend.attempts import ATTEMPTS_MAX, BREAKS_MAX, Attempts
from tandem_frontend.continuation import continued, obstacle
from tandem_frontend.dispatch import Dispatch, Dispatched
from tandem_frontend.models import ServedModel
from tandem_frontend.routing.breakers import Breakers
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.refusals import Refusals
from tandem_frontend.routing.routes import Routes
from tandem_frontend.supervision import Bounds

from tandem.api.decode.v1.decode_service_pb2 import DecodeResponse
from tandem.api.types.v1 import generation_pb2, leg_pb2, sampling_pb2
from tandem.errors import DeadlinePassed, LegFailed, ServiceError, TandemError
from tandem.model.request_state import Phase
from tandem.model.worker import Worker
from tandem.observe.trace_context import Headers
from tandem.runtime.clock import ManualClock

PROMPT = (11, 12, 13)
KILLED = ServiceError("connection reset")


def leg(max_tokens: int = 10, **fields: Any) -> leg_pb2.LegRequest:
    stopping = sampling_pb2.Stopping(max_tokens=max_tokens)
    return leg_pb2.LegRequest(request_id="r", token_ids=PROMPT, stopping=stopping, **fields)


def answer(prompt: tuple[int, ...], count: int) -> list[int]:
    """A greedy model: each token depends on all before it."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append((sum(sequence) * 31 + len(sequence)) % 1009)
    return sequence[len(prompt) :]


class Fleet:
    """Workers that answer greedily, and break after so many tokens of an attempt where a fault says so."""

    def __init__(self, decodes: int = 4, faults: dict[int, tuple[int, TandemError]] | None = None) -> None:
        """`faults`: number of the attempt -> (tokens of it that still come, how it breaks)."""
        self.faults = faults or {}
        self.sent: list[Dispatched] = []
        self.legs: list[leg_pb2.LegRequest] = []
        self.headers: list[Headers] = []
        workers = (*(prefill(f"prefill-{n}") for n in range(2)), *(decode(f"decode-{n}") for n in range(decodes)))
        clock = ManualClock(100.0)
        refusals = Refusals(clock)
        breakers = Breakers(clock, random.Random(7))
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        routes = Routes(model, lambda: workers, tuple, refusals, breakers, random.Random(7))
        bounds = Bounds(accept_s=1.0, silence_s=1.0)
        self.attempts = Attempts(
            routes, refusals, breakers, cast("Dispatch", self), self.answers, bounds, clock, _no_pause()
        )

    async def answers(self, worker: Worker) -> bool:
        return True

    def send(
        self, route: Route, sent: leg_pb2.LegRequest, attempt: int, timeout_s: float | None, headers: Headers = ()
    ) -> Dispatched:
        tokens = answer(tuple(sent.token_ids), sent.stopping.max_tokens)
        events: list[Any] = [
            DecodeResponse(tokens=leg_pb2.LegTokens(index=index, token_ids=[token]))
            for index, token in enumerate(tokens)
        ]
        events.append(DecodeResponse(finish=leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH)))
        if attempt in self.faults:
            count, problem = self.faults[attempt]
            events[count:] = [problem]
        finish = DecodeResponse(finish=leg_pb2.LegFinish())
        calls = PlayedCall(ACCEPTED, *events), PlayedCall(ACCEPTED, finish)
        self.sent.append(Dispatched(route, attempt, attempt, cast("Any", calls[0]), cast("Any", calls[1])))
        self.legs.append(sent)
        self.headers.append(headers)
        return self.sent[-1]


async def stream(fleet: Fleet, request: leg_pb2.LegRequest, is_over: Callable[[], bool] = lambda: False) -> list[int]:
    got: list[int] = []
    async with fleet.attempts.taken(request, None) as whole:
        try:
            async for tokens in whole.tokens(is_over):
                assert tokens.index == len(got), "the client's stream has no gap and no repetition"
                got += tokens.token_ids
        except TandemError as problem:
            problem.metadata["got"] = str(len(got))
            raise
        assert whole.state.phase is Phase.FINISHED
        finish = whole.finish()
        assert finish is not None
        assert finish.reason == generation_pb2.FINISH_REASON_LENGTH
    return got


@given(st.data(), st.integers(1, 12))
async def test_a_stream_that_breaks_anywhere_is_the_undisturbed_one(data: st.DataObject, max_tokens: int) -> None:
    breaks = data.draw(st.integers(0, BREAKS_MAX))
    faults, left = {}, max_tokens
    for number in range(1, breaks + 1):
        count = data.draw(st.integers(0, left))
        # Three in a row without a token are the end; at least one comes before each break here.
        count = max(count, min(1, left))
        faults[number], left = (count, KILLED), left - count
    assert await stream(Fleet(decodes=8, faults=faults), leg(max_tokens)) == answer(PROMPT, max_tokens)


async def test_a_continuation_goes_to_other_workers_with_the_tokens_so_far() -> None:
    fleet = Fleet(faults={1: (4, KILLED)})
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    first, second = fleet.sent
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.room != second.room
    assert first.route.decode != second.route.decode
    assert tuple(fleet.legs[1].token_ids) == (*PROMPT, *answer(PROMPT, 4))
    assert fleet.legs[1].stopping.max_tokens == 6
    for call in (first.decode, first.prefill):
        assert cast("PlayedCall", call).cancelled.is_set(), "both legs of the broken attempt are ended"


async def test_before_the_first_token_the_request_begins_again() -> None:
    fleet = Fleet(faults={1: (0, KILLED)})
    assert await stream(fleet, leg(5)) == answer(PROMPT, 5)
    assert fleet.legs[1] == fleet.legs[0]


async def test_a_stream_that_breaks_again_and_again_has_an_end() -> None:
    fleet = Fleet(decodes=12, faults=dict.fromkeys(range(1, 20), (1, KILLED)))
    with pytest.raises(LegFailed) as failed:
        await stream(fleet, leg(100))
    assert failed.value.metadata["continuation"] == "breaks"
    assert len(fleet.sent) == BREAKS_MAX + 1


async def test_no_worker_gets_a_request_twice_that_broke_on_it() -> None:
    fleet = Fleet(decodes=1, faults={1: (2, KILLED)})
    with pytest.raises(LegFailed) as failed:
        await stream(fleet, leg(9))
    assert failed.value.metadata["continuation"] == "workers"
    assert failed.value.metadata["got"] == "2"
    assert len(fleet.sent) == 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"guided": sampling_pb2.Guided(regex="a+")}, "guided"),
        ({"sampling": sampling_pb2.Sampling(presence_penalty=0.5)}, "penalties"),
        ({"sampling": sampling_pb2.Sampling(frequency_penalty=-0.5)}, "penalties"),
        ({"sampling": sampling_pb2.Sampling(repetition_penalty=1.1)}, "penalties"),
    ],
)
async def test_what_would_go_on_wrongly_does_not_go_on(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(LegFailed, match="connection reset") as failed:
        await stream(Fleet(faults={1: (3, KILLED)}), leg(**fields))
    assert failed.value.metadata["continuation"] == why
    assert failed.value.metadata["phase"] == "decoding"
    # Nothing has been drawn before the first token, so nothing can go wrong.
    assert await stream(Fleet(faults={1: (0, KILLED)}), leg(5, **fields)) == answer(PROMPT, 5)


def test_neutral_penalties_are_no_obstacle() -> None:
    neutral = sampling_pb2.Sampling(presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, seed=3)
    assert obstacle(leg(sampling=neutral)) is None


async def test_the_clients_deadline_is_not_the_failure_of_a_leg() -> None:
    fleet = Fleet(faults={1: (3, DeadlinePassed("late"))})
    with pytest.raises(DeadlinePassed):
        await stream(fleet, leg())
    assert len(fleet.sent) == 1


async def test_a_leg_that_breaks_after_its_last_token_is_not_missed() -> None:
    """All tokens were passed on; only the engine's account of them is lost."""
    fleet = Fleet(faults={1: (10, KILLED)})
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    assert len(fleet.sent) == 1


async def test_a_leg_that_breaks_after_a_stop_is_not_missed() -> None:
    fleet = Fleet(faults={1: (4, KILLED)})
    got: list[int] = []
    async with fleet.attempts.taken(leg(10), None) as whole:
        async for tokens in whole.tokens(lambda: len(got) == 4):
            got.extend(tokens.token_ids)
    assert len(got) == 4
    assert len(fleet.sent) == 1


async def test_attempts_in_a_row_without_a_token_are_bounded() -> None:
    fleet = Fleet(decodes=12, faults=dict.fromkeys(range(1, 20), (0, KILLED)))
    with pytest.raises(LegFailed) as failed:
        await stream(fleet, leg())
    assert "continuation" not in failed.value.metadata, "nothing had been passed on"
    assert len(fleet.sent) == ATTEMPTS_MAX


@given(st.integers(1, 50), st.integers(0, 49), st.one_of(st.none(), st.integers(0, 60)))
def test_budgets_count_what_the_client_has(max_tokens: int, sent: int, min_tokens: int | None) -> None:
    sent = min(sent, max_tokens - 1)
    whole = leg(max_tokens)
    if min_tokens is not None:
        whole.stopping.min_tokens = min_tokens
    rest = continued(whole, range(sent))
    assert rest.stopping.max_tokens + sent == max_tokens
    assert len(rest.token_ids) == len(PROMPT) + sent
    if min_tokens is not None:
        assert rest.stopping.min_tokens == max(0, min_tokens - sent)
    assert whole.stopping.max_tokens == max_tokens, "the original is what the next continuation begins with"


def _no_pause() -> random.Random:
    class Zero(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return 0.0

    return Zero()
