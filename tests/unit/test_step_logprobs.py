"""Log probabilities that JSON cannot carry end their leg with a sentence, and never reach it."""

from __future__ import annotations

import json
import math

import pytest
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.link_leg import Logprobs, Sink
from tandem_frontend.execution.step_logprobs import fault_in
from tandem_frontend.openai import response as wire
from tandem_frontend.routing.candidates import Route

from tandem.api.types.v1.generation_pb2 import RankedToken, TokenLogprob
from tandem.domain.worker import Worker
from tandem.errors import LegFailed
from tests.unit.support.frontend_workers import CAPABILITIES, aggregated
from tests.unit.support.scripted_legs import FINISH, ScriptedLeg, Word, accepted

BELOW = CAPABILITIES.vocabulary_size
RIGHT = TokenLogprob(token_id=5, logprob=-0.5, top=[RankedToken(token_id=BELOW - 1, logprob=-math.inf)])


class Owner:
    """Keeps what the attempt passes on."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def tokens(self, token_ids: list[int], logprobs: Logprobs) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs

    def is_replaceable(self, worker: Worker) -> bool:
        return False


async def heard(*logprobs: TokenLogprob, wants_logprobs: bool) -> Owner:
    """What is passed on of one token that comes with these."""
    owner, route = Owner(), Route(aggregated(), None)
    word: Word = lambda sink: sink.tokens(0, [5], logprobs)  # noqa: E731

    def send(sinks: tuple[Sink, Sink | None]) -> Dispatched:
        return Dispatched(route, 1, 0, ScriptedLeg(accepted, word, FINISH).play(sinks[0]), None)

    attempt = Attempt(route, owner, wants_logprobs=wants_logprobs)  # type: ignore[arg-type]
    try:
        await attempt.start(send)
        await attempt.wait()
    finally:
        attempt.end()
    return owner


@pytest.mark.parametrize(
    ("logprob", "sentence"),
    [
        (TokenLogprob(token_id=-1), f"is for token -1, outside the vocabulary of {BELOW}"),
        (TokenLogprob(token_id=BELOW), f"is for token {BELOW}, outside"),
        (TokenLogprob(token_id=5, top=[RankedToken(token_id=-1)]), "is for token -1, outside"),
        (TokenLogprob(token_id=5, logprob=math.nan), "the log probability of token 5 is nan"),
        (TokenLogprob(token_id=5, logprob=math.inf), "the log probability of token 5 is inf"),
        (TokenLogprob(token_id=5, top=[RankedToken(token_id=6, logprob=math.nan)]), "token 6 is nan"),
    ],
    ids=["negative", "above", "rival", "nan", "infinite", "rival nan"],
)
async def test_an_invalid_log_probability_ends_the_leg(logprob: TokenLogprob, sentence: str) -> None:
    with pytest.raises(LegFailed, match=sentence):
        await heard(logprob, wants_logprobs=True)


@pytest.mark.parametrize("count", [0, 2])
async def test_as_many_as_tokens_are_needed_where_they_were_asked_for(count: int) -> None:
    with pytest.raises(LegFailed, match=f"received {count} log probabilities with 1 tokens"):
        await heard(*[RIGHT] * count, wants_logprobs=True)


async def test_valid_log_probabilities_are_passed_on() -> None:
    assert (await heard(RIGHT, wants_logprobs=True)).logprobs == [RIGHT]
    assert fault_in([RIGHT], BELOW) is None


async def test_log_probabilities_without_a_request_for_them_are_dropped() -> None:
    owner = await heard(RIGHT, RIGHT, wants_logprobs=False)
    assert (owner.token_ids, owner.logprobs) == ([5], [])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_answer_holds_what_json_cannot_say(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        wire.to_json({"logprob": number})
    assert json.loads(wire.to_json({"logprob": -9999.0})) == {"logprob": -9999.0}
