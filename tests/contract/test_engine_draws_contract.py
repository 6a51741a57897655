"""Sampling on one aggregated engine: reproducible only with a seed, independent of the batch, never slow."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tandem.domain.generation import Sampling
from tests.contract.support.engine_process import EngineProcess
from tests.contract.support.fleet import DRAWN, DRAWN_LENGTH, GREEDY, Fleet, assert_idle, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

FIRST_USE_S_MAX = 8
UNSEEDED = Sampling(temperature=1.0)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(fleet: Fleet) -> EngineProcess:
    return await fleet.aggregated()


async def draw(engine: EngineProcess, sampling: Sampling, max_tokens: int = 16) -> list[int]:
    prompt = prompt_of(DRAWN_LENGTH, engine.capabilities.vocabulary_size)
    return (await engine.generate(request_of(prompt, max_tokens, sampling=sampling)).all()).token_ids


async def test_the_first_penalty_and_the_first_seed_delay_no_stream(engine: EngineProcess) -> None:
    begin_s = time.monotonic()
    await draw(engine, Sampling(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.1, seed=5))
    assert time.monotonic() - begin_s < FIRST_USE_S_MAX


async def test_the_same_seed_draws_the_same(engine: EngineProcess, fleet: Fleet) -> None:
    expected = await fleet.drawn()
    assert [await draw(engine, sampling) for sampling in DRAWN] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(DRAWN)


async def test_seeds_differ(engine: EngineProcess) -> None:
    draws = [await draw(engine, Sampling(temperature=1.0, seed=seed)) for seed in range(8)]
    assert len({tuple(tokens) for tokens in draws}) == 8
    assert len({tokens[0] for tokens in draws}) > 1


async def test_without_a_seed_nothing_repeats(engine: EngineProcess) -> None:
    draws = [await draw(engine, UNSEEDED) for _ in range(4)]
    assert len({tuple(tokens) for tokens in draws}) == 4


async def test_a_seed_does_nothing_to_a_greedy_request(engine: EngineProcess) -> None:
    greedy = await draw(engine, GREEDY)
    assert await draw(engine, Sampling(temperature=0.0, seed=3)) == greedy


async def test_a_continuation_draws_on(engine: EngineProcess) -> None:
    sampling = Sampling(temperature=1.0, seed=11)
    whole = await draw(engine, sampling)
    prompt = prompt_of(DRAWN_LENGTH, engine.capabilities.vocabulary_size)
    rest = await engine.generate(request_of(prompt + tuple(whole[:5]), 11, sampling=sampling)).all()
    assert rest.token_ids == whole[5:]


async def test_a_seed_keeps_to_its_own_row_of_a_mixed_batch(engine: EngineProcess, fleet: Fleet) -> None:
    """Requests come and go at different times, so that batches are merged and filtered with and without seeds."""
    expected, greedy = await fleet.drawn(), await draw(engine, GREEDY)

    async def late(place: int, sampling: Sampling, max_tokens: int) -> list[int]:
        await asyncio.sleep(0.01 * place)
        return await draw(engine, sampling, max_tokens)

    wanted = [UNSEEDED, DRAWN[0], GREEDY, DRAWN[1], UNSEEDED, DRAWN[2], DRAWN[3], UNSEEDED]
    lengths = [9, 16, 12, 5, 16, 16, 7, 3]
    got = await asyncio.gather(*(late(i, s, n) for i, (s, n) in enumerate(zip(wanted, lengths, strict=True))))
    for sampling, tokens, count in zip(wanted, got, lengths, strict=True):
        if sampling in DRAWN:
            assert tokens == expected[DRAWN.index(sampling)][:count]
        elif sampling is GREEDY:
            assert tokens == greedy[:count]
    assert len({tuple(got[place][:3]) for place in (0, 4, 7)}) > 1
    await assert_idle(engine)
