"""A client's stream when its legs fail: continuation and retry, on scripted calls."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.execution.continuation import continued, refusal_reason
from tandem_frontend.execution.dispatch import Dispatch, Dispatched
from tandem_frontend.execution.link_leg import Sink
from tandem_frontend.execution.request_stream import ATTEMPTS_MAX, BREAKS_MAX, ExecutionDeps
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes

from tandem.api.types.v1 import generation_pb2, leg_pb2, sampling_pb2
from tandem.clock import ManualClock
from tandem.domain.request_state import Phase
from tandem.errors import DeadlinePassed, KvCorrupt, LegFailed, ServiceError, TandemError
from tandem.observability.trace_context import Headers
from tests.unit.support.frontend_workers import CAPABILITIES, decode, prefill
from tests.unit.support.scripted_legs import FINISH, Gathered, ScriptedLeg, Word, accepted, fail, tokens

PROMPT = (11, 12, 13)
KILLED = ServiceError("connection reset")
NEW = "c" * 64
"""Digest of other weights than those of `CAPABILITIES`."""


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
    """Workers that generate greedily, and fail after a number of tokens where a fault says so."""

    def __init__(
        self,
        decodes: int = 4,
        faults: dict[int, tuple[int, TandemError]] | None = None,
        *,
        answers_come_late: bool = False,
        new_weights: int = 0,
        prefills: int = 2,
        seed: int = 7,
    ) -> None:
        """`faults`: number of the attempt -> (tokens of it that still come, how it breaks).

        `answers_come_late`: tokens and breaks of an attempt overtake what the workers answer to its start.
        `new_weights`: that many pairs with other weights. `seed`: of the choice among workers.
        """
        self.faults = faults or {}
        self.answers_come_late = answers_come_late
        self.sent: list[Dispatched] = []
        self.legs: list[leg_pb2.LegRequest] = []
        self.headers: list[Headers] = []
        workers = tuple(prefill(f"prefill-{n}") for n in range(prefills))
        workers += tuple(decode(f"decode-{n}") for n in range(decodes))
        for number in range(new_weights):
            workers += tuple(make(f"new-{make.__name__}-{number}", model_digest=NEW) for make in (prefill, decode))
        clock = ManualClock(100.0)
        refusals = RecentRefusals(clock)
        breakers = CircuitBreakers(clock, random.Random(7))
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        routes = Routes(model, lambda: workers, tuple, refusals, breakers, random.Random(seed))
        self.attempts = ExecutionDeps(routes, refusals, breakers, cast("Dispatch", self), clock, _no_pause())

    def send(
        self,
        route: Route,
        sent: leg_pb2.LegRequest,
        attempt: int,
        sinks: tuple[Sink, Sink | None],
        timeout_s: float | None,
        headers: Headers = (),
    ) -> Dispatched:
        whole = answer(tuple(sent.token_ids), sent.stopping.max_tokens)
        words: list[Word] = [tokens(index, token) for index, token in enumerate(whole)]
        words.append(FINISH)
        if attempt in self.faults:
            count, problem = self.faults[attempt]
            words[count:] = [fail(problem)]
        assert sinks[1] is not None
        if self.answers_come_late and attempt in self.faults:
            prefill_leg, decode_leg = ScriptedLeg().play(sinks[1]), ScriptedLeg(*words).play(sinks[0])
        else:
            prefill_leg, decode_leg = (
                ScriptedLeg(accepted, FINISH).play(sinks[1]),
                ScriptedLeg(accepted, *words).play(sinks[0]),
            )
        self.sent.append(Dispatched(route, attempt, attempt, decode_leg, prefill_leg))
        self.legs.append(sent)
        self.headers.append(headers)
        return self.sent[-1]


async def stream(fleet: Fleet, request: leg_pb2.LegRequest) -> list[int]:
    got = Gathered()
    async with fleet.attempts.accepted(request, got, None) as whole:
        try:
            await whole.run()
        except TandemError as problem:
            problem.metadata["got"] = str(len(got.token_ids))
            raise
        assert whole.state.phase is Phase.FINISHED
        end = whole.finish()
        assert end is not None
        assert end.reason == generation_pb2.FINISH_REASON_LENGTH
    return got.token_ids


@given(st.data(), st.integers(1, 12), st.booleans())
async def test_a_continued_stream_equals_the_undisturbed_one(
    data: st.DataObject, max_tokens: int, answers_come_late: bool
) -> None:
    breaks = data.draw(st.integers(0, BREAKS_MAX))
    faults: dict[int, tuple[int, TandemError]] = {}
    left = max_tokens
    for number in range(1, breaks + 1):
        count = data.draw(st.integers(0, left))
        # Three in a row without a token are the end; at least one comes before each break here.
        count = max(count, min(1, left))
        faults[number], left = (count, KILLED), left - count
    fleet = Fleet(decodes=8, faults=faults, answers_come_late=answers_come_late)
    assert await stream(fleet, leg(max_tokens)) == answer(PROMPT, max_tokens)


async def test_a_continuation_goes_to_other_workers_with_the_tokens_so_far() -> None:
    fleet = Fleet(faults={1: (4, KILLED)})
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    first, second = fleet.sent
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.room != second.room
    assert first.route.decode != second.route.decode
    assert tuple(fleet.legs[1].token_ids) == (*PROMPT, *answer(PROMPT, 4))
    assert fleet.legs[1].stopping.max_tokens == 6
    for scripted in (first.decode, first.prefill):
        assert cast("ScriptedLeg", scripted).aborted.is_set(), "both legs of the broken attempt are ended"


async def test_before_the_first_token_the_request_is_retried() -> None:
    fleet = Fleet(faults={1: (0, KILLED)})
    assert await stream(fleet, leg(5)) == answer(PROMPT, 5)
    assert fleet.legs[1] == fleet.legs[0]


@pytest.mark.parametrize("answers_come_late", [False, True])
async def test_breaks_of_one_stream_are_limited(answers_come_late: bool) -> None:
    faults: dict[int, tuple[int, TandemError]] = dict.fromkeys(range(1, 20), (1, KILLED))
    fleet = Fleet(decodes=12, faults=faults, answers_come_late=answers_come_late)
    with pytest.raises(LegFailed) as failed:
        await stream(fleet, leg(100))
    assert failed.value.metadata["continuation"] == "breaks"
    assert len(fleet.sent) == BREAKS_MAX + 1


async def test_no_worker_gets_a_request_again_that_failed_on_it() -> None:
    fleet = Fleet(decodes=1, faults={1: (2, KILLED)})
    with pytest.raises(LegFailed) as failed:
        await stream(fleet, leg(9))
    assert failed.value.metadata["continuation"] == "workers"
    assert failed.value.metadata["got"] == "2"
    assert len(fleet.sent) == 1


@given(st.integers(0, 2**32), st.integers(1, 9))
async def test_a_stream_is_continued_only_by_the_weights_that_began_it(seed: int, count: int) -> None:
    fleet = Fleet(decodes=2, new_weights=2, seed=seed, faults={1: (count, KILLED)})
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    digests = {worker.capabilities.model_digest for sent in fleet.sent for worker in sent.route.workers}
    assert len(fleet.sent) == 2
    assert len(digests) == 1


async def test_a_stream_whose_weights_no_worker_has_any_more_fails_and_says_so() -> None:
    fleet = Fleet(decodes=1, new_weights=1, faults={1: (3, KILLED), 2: (3, KILLED)})
    with pytest.raises(LegFailed, match=r"reset; no worker has the weights .* began with \((a{12}|c{12})\)") as failed:
        await stream(fleet, leg(9))
    began = fleet.sent[0].route.decode.capabilities.model_digest
    assert failed.value.metadata["continuation"] == "weights"
    assert failed.value.metadata["model_digest"] == began
    assert failed.value.metadata["got"] == "3"
    assert len(fleet.sent) == 1


async def test_a_request_without_tokens_is_retried_on_other_weights() -> None:
    fleet = Fleet(decodes=1, new_weights=1, faults={1: (0, KILLED)})
    assert await stream(fleet, leg(5)) == answer(PROMPT, 5)
    first, second = (sent.route.decode.capabilities.model_digest for sent in fleet.sent)
    assert first != second


@given(st.integers(0, 2**32))
async def test_the_weights_of_a_stream_are_those_of_its_first_token(seed: int) -> None:
    """Not those of an attempt that failed before it."""
    fleet = Fleet(decodes=3, new_weights=3, seed=seed, faults={1: (0, KILLED), 2: (2, KILLED)})
    assert await stream(fleet, leg(9)) == answer(PROMPT, 9)
    digests = [sent.route.decode.capabilities.model_digest for sent in fleet.sent]
    assert digests[1] == digests[2]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"guided": sampling_pb2.Guided(regex="a+")}, "guided"),
        ({"sampling": sampling_pb2.Sampling(presence_penalty=0.5)}, "penalties"),
        ({"sampling": sampling_pb2.Sampling(frequency_penalty=-0.5)}, "penalties"),
        ({"sampling": sampling_pb2.Sampling(repetition_penalty=1.1)}, "penalties"),
    ],
)
async def test_a_stream_that_cannot_be_continued_correctly_fails(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(LegFailed, match="connection reset") as failed:
        await stream(Fleet(faults={1: (3, KILLED)}), leg(**fields))
    assert failed.value.metadata["continuation"] == why
    assert failed.value.metadata["phase"] == "decoding"
    # Nothing has been drawn before the first token, so nothing can go wrong.
    assert await stream(Fleet(faults={1: (0, KILLED)}), leg(5, **fields)) == answer(PROMPT, 5)


def test_neutral_penalties_allow_continuation() -> None:
    neutral = sampling_pb2.Sampling(presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, seed=3)
    assert refusal_reason(leg(sampling=neutral)) is None


async def test_the_clients_deadline_is_not_the_failure_of_a_leg() -> None:
    fleet = Fleet(faults={1: (3, DeadlinePassed("late"))})
    with pytest.raises(DeadlinePassed):
        await stream(fleet, leg())
    assert len(fleet.sent) == 1


async def test_a_leg_may_fail_after_its_last_token() -> None:
    """All tokens were passed on; only the engine's usage is lost."""
    fleet = Fleet(faults={1: (10, KILLED)})
    assert await stream(fleet, leg(10)) == answer(PROMPT, 10)
    assert len(fleet.sent) == 1


async def test_a_leg_may_fail_after_a_stop() -> None:
    fleet = Fleet(faults={1: (4, KILLED)})
    got = Gathered(stop_after=4)
    async with fleet.attempts.accepted(leg(10), got, None) as whole:
        await whole.run()
    assert len(got.token_ids) == 4
    assert len(fleet.sent) == 1


async def test_attempts_in_a_row_without_a_token_are_limited() -> None:
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


async def test_tokens_beyond_max_tokens_are_dropped() -> None:
    fleet = Fleet()
    got = Gathered()
    async with fleet.attempts.accepted(leg(3), got, None) as whole:
        scripted = cast("ScriptedLeg", fleet.sent[0].decode)
        scripted._words.clear()
        whole.attempt._decode._expected_index = 0
        whole.attempt._decode.tokens(0, answer(PROMPT, 9), ())
        await whole.run()
        end = whole.finish()
    assert got.token_ids == answer(PROMPT, 3)
    assert end is not None
    assert end.reason == generation_pb2.FINISH_REASON_LENGTH


async def test_a_defect_in_a_response_fails_its_request_alone() -> None:
    class Broken(Gathered):
        def take(self, token_ids: Any, logprobs: Any) -> None:
            raise KeyError("defect")

    fleet = Fleet()
    async with fleet.attempts.accepted(leg(3), Broken(), None) as whole:
        with pytest.raises(TandemError, match="internal error in a response: KeyError"):
            await whole.run()
    assert len(fleet.sent) == 1, "another worker would change nothing"


CORRUPT = KvCorrupt("the KV that arrived is not what the prefill engine sent", phase="transferring")


async def test_corrupt_kv_moves_a_stream_to_workers_other_than_both_of_the_pair() -> None:
    fleet = Fleet(decodes=2, faults={1: (0, CORRUPT)})
    assert await stream(fleet, leg(5, guided=sampling_pb2.Guided(regex="x"))) == answer(PROMPT, 5)
    first, second = ({worker.worker_id for worker in sent.route.workers} for sent in fleet.sent)
    assert not first & second, "nothing says which end is at fault"
    assert {start[0] for start in fleet.attempts.refusals.recent()} == first


async def test_corrupt_kv_is_repeated_on_the_only_pair_and_then_named_by_its_type() -> None:
    fleet = Fleet(decodes=1, prefills=1, faults={1: (0, CORRUPT), 2: (0, CORRUPT)})
    assert await stream(fleet, leg(5)) == answer(PROMPT, 5)
    assert [sent.route for sent in fleet.sent] == [fleet.sent[0].route] * ATTEMPTS_MAX
    fleet = Fleet(decodes=1, prefills=1, faults=dict.fromkeys(range(1, 9), (0, CORRUPT)))
    with pytest.raises(KvCorrupt, match="decode leg on decode-0 failed in phase transferring") as failed:
        await stream(fleet, leg(5))
    assert len(fleet.sent) == ATTEMPTS_MAX
    assert failed.value.reason == "KV_CORRUPT"
    assert (failed.value.metadata["worker"], failed.value.metadata["prefill"]) == ("decode-0", "prefill-0")


async def test_corrupt_kv_counts_for_the_circuit_breakers_of_both_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, failed = Fleet(faults={1: (0, CORRUPT)}), list[str]()
    monkeypatch.setattr(fleet.attempts.breakers, "failed", lambda worker, sent_s: failed.append(worker.worker_id))
    await stream(fleet, leg(5))
    assert failed == [worker.worker_id for worker in fleet.sent[0].route.workers]
