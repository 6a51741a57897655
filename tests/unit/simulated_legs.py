"""Legs without an engine around them, for the tests of the simulated engine's scheduler, budget and timing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tandem.engine.simulated.kv_pages import PageNames
from tandem.engine.simulated.leg import Leg
from tandem.engine.simulated.tokens import Vocabulary, expected_tokens
from tandem.model.generation import EngineRequest, Sampling, Stopping, TokenBatch

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
        page_names=PageNames(PAGE),
    )


def assert_stream_is_right(leg: Leg) -> None:
    """What a leg has put out is what an undisturbed run emits: nothing lost, repeated or from another leg."""
    batches = [leg.batches.get_nowait() for _ in range(leg.batches.qsize())]
    tokens = [token for batch in batches if not isinstance(batch, BaseException) for token in batch.token_ids]
    assert leg.emitted == expected_tokens(VOCABULARY, leg.request.token_ids, len(leg.emitted))
    assert tokens == leg.emitted[: len(tokens)]
    if batches and isinstance(batches[-1], TokenBatch) and batches[-1].finish is not None:
        assert batches[-1].finish.completion_tokens == len(tokens)
