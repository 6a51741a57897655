"""Legs without an engine around them, for the tests of the simulated engine's scheduler, budget and timing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tandem.domain.generation import EngineFinish, EngineRequest, Sampling, Stopping, TokenLogprob
from tandem.domain.kv_blocks import BlockHashes
from tandem.engine.simulated.leg import Leg
from tandem.engine.simulated.tokens import Vocabulary, expected_tokens
from tandem.errors import TandemError

PAGE = 4
VOCABULARY = Vocabulary(range(3, 200), 2)
_numbers = itertools.count(1)


def leg_of(prompt: Sequence[int], new_tokens: int = 8, *, ignore_eos: bool = False) -> Leg:
    return Leg(
        request=EngineRequest(
            request_id=f"leg-{next(_numbers)}",
            token_ids=tuple(prompt),
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=new_tokens, ignore_eos=ignore_eos),
        ),
        vocabulary=VOCABULARY,
        token_budget=new_tokens,
        page_names=BlockHashes(PAGE),
        output=Collected(),
    )


class Collected:
    """What a leg has put out."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finishes: list[EngineFinish] = []
        self.failures: list[TandemError] = []

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        assert not self.finishes
        assert not self.failures
        self.token_ids += token_ids

    def finish(self, finish: EngineFinish) -> None:
        self.finishes.append(finish)

    def fail(self, problem: TandemError) -> None:
        self.failures.append(problem)


def assert_stream_is_right(leg: Leg) -> None:
    """What a leg has put out is what an undisturbed run emits: nothing lost, repeated or from another leg."""
    output = leg.output
    assert isinstance(output, Collected)
    assert leg.emitted == expected_tokens(VOCABULARY, leg.request.token_ids, len(leg.emitted))
    assert output.token_ids == leg.emitted[: len(output.token_ids)]
    assert len(output.finishes) + len(output.failures) <= 1
    for finish in output.finishes:
        assert finish.completion_tokens == len(output.token_ids)
