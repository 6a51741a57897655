"""The engine port on a prefill and a decode engine in two processes: the same tokens, and KV was transferred."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tandem.domain.generation import FinishReason, KvCheck, Sampling
from tandem.domain.worker import incompatible_field
from tests.contract.support.fleet import (
    CONCURRENT,
    DRAWN,
    DRAWN_LENGTH,
    PROMPT_LENGTHS,
    Fleet,
    Pair,
    prompt_of,
    request_of,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(loop_scope="session")
async def pair(fleet: Fleet) -> Pair:
    await fleet.reference()  # before the pair, because these are the aggregated engine's
    await fleet.drawn()
    await fleet.rated()
    return await fleet.pair()


def prompt(pair: Pair, length: int, seed: int = 0) -> tuple[int, ...]:
    return prompt_of(length, pair.decode.capabilities.vocabulary_size, seed)


async def test_legs_suit_each_other(pair: Pair) -> None:
    prefill, decode = pair.prefill.capabilities, pair.decode.capabilities
    assert incompatible_field(prefill, decode) is None
    assert decode.transfer_backend not in ("none", "fake")
    assert pair.prefill.bootstrap is not None
    assert pair.prefill.bootstrap.port > 0
    assert pair.decode.bootstrap is None


async def test_logprobs_of_the_prompt_are_those_of_an_aggregated_engine(pair: Pair, fleet: Fleet) -> None:
    length = PROMPT_LENGTHS[-1]
    expected = await fleet.rated()
    for _ in range(2):  # the second time its prefix is cached on prefill
        room = pair.room()
        legs = (
            pair.prefill.generate(
                request_of(prompt(pair, length), 4, bootstrap=room, top_logprobs=1, prompt_logprobs=True)
            ),
            pair.decode.generate(request_of(prompt(pair, length), 4, bootstrap=room, top_logprobs=1)),
        )
        prefill, decode = await asyncio.gather(*(leg.all() for leg in legs))
        entries = prefill.finish.prompt_logprobs
        assert decode.finish.prompt_logprobs == ()
        assert [entry.token_id for entry in entries] == [entry.token_id for entry in expected]
        assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected], abs=1e-3)
        assert decode.token_ids == (await fleet.reference())[length].token_ids[:4]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
async def test_pair_equals_aggregated(pair: Pair, fleet: Fleet, length: int) -> None:
    expected = (await fleet.reference())[length].token_ids
    prefill, decode = await pair.run(prompt(pair, length))
    assert decode.token_ids == expected
    assert prefill.token_ids == expected[:1]
    assert decode.finish.reason is FinishReason.LENGTH


async def test_concurrent_attempts_do_not_cross(pair: Pair, fleet: Fleet) -> None:
    reference = await fleet.reference()
    lengths = PROMPT_LENGTHS[-CONCURRENT:]
    results = await asyncio.gather(*(pair.run(prompt(pair, length)) for length in lengths))
    assert [decode.token_ids for _, decode in results] == [reference[n].token_ids for n in lengths]
    await pair.assert_idle()


async def test_legs_may_come_in_either_order(pair: Pair, fleet: Fleet) -> None:
    expected = (await fleet.reference())[100].token_ids
    for first, second in ((pair.prefill, pair.decode), (pair.decode, pair.prefill)):
        room = pair.room()
        early = first.generate(request_of(prompt(pair, 100), bootstrap=room))
        await asyncio.sleep(0.3)  # the case itself: the other leg is late
        late = second.generate(request_of(prompt(pair, 100), bootstrap=room))
        results = await asyncio.gather(early.all(), late.all())
        assert [r.token_ids for r in results if len(r.token_ids) > 1] == [expected]


@pytest.mark.parametrize("length", [1, 17, 300])
async def test_every_prompt_token_came_over_the_transfer(pair: Pair, length: int) -> None:
    _, decode = await pair.run(prompt(pair, length, seed=3))
    c = pair.decode.capabilities
    page = c.page_size_tokens
    whole_pages_tokens = -(-length // page) * page
    assert decode.finish.recomputed_tokens == 0
    assert decode.finish.kv_check is KvCheck.MATCHED
    assert decode.finish.timings is not None
    moved_bytes = decode.finish.timings.kv_transfer_bytes
    assert moved_bytes is not None
    assert length * c.kv_bytes_per_token <= moved_bytes <= whole_pages_tokens * c.kv_bytes_per_token


async def test_usage_of_both_legs(pair: Pair) -> None:
    prefill, decode = await pair.run(prompt(pair, 48))
    assert (prefill.finish.prompt_tokens, prefill.finish.completion_tokens) == (48, 1)
    assert (decode.finish.prompt_tokens, decode.finish.completion_tokens) == (48, 16)


async def test_one_token(pair: Pair, fleet: Fleet) -> None:
    prefill, decode = await pair.run(prompt(pair, 64), 1)
    assert prefill.token_ids == decode.token_ids == (await fleet.reference())[64].token_ids[:1]
    assert decode.finish.reason is FinishReason.LENGTH


async def test_stop_token_on_decode(pair: Pair, fleet: Fleet) -> None:
    expected = (await fleet.reference())[128].token_ids
    place = max(i for i, t in enumerate(expected) if t not in expected[:i])
    stop = expected[place]
    _, decode = await pair.run(prompt(pair, 128), stop_token_ids=(stop,), ignore_eos=False)
    assert decode.token_ids == expected[: place + 1]
    assert (decode.finish.reason, decode.finish.matched_token_id) == (FinishReason.STOP, stop)


async def test_logprobs_equal_the_aggregated_ones_from_the_first_token_on(pair: Pair, fleet: Fleet) -> None:
    for length in (5, 100, 300):
        expected = (await fleet.reference())[length].logprobs
        _, decode = await pair.run(prompt(pair, length), top_logprobs=2)
        assert [p.token_id for p in decode.logprobs] == decode.token_ids == [p.token_id for p in expected]
        assert [p.logprob for p in decode.logprobs] == pytest.approx([p.logprob for p in expected], abs=1e-3)
        assert all(len(p.top) == 2 for p in decode.logprobs)


async def test_timings_of_both_legs_are_ordered(pair: Pair) -> None:
    before_s = time.time()
    prefill, decode = await pair.run(prompt(pair, 200, seed=5))
    after_s = time.time()
    p, d = prefill.finish.timings, decode.finish.timings
    assert p is not None
    assert d is not None
    # Not the end of the transfer on prefill beside its computing: chunks move while later ones are computed.
    for name, times_s in {
        "prefill": (p.queued_time_s, p.bootstrap_end_time_s, p.prefill_start_time_s, p.prefill_end_time_s),
        "transfer": (p.prefill_start_time_s, p.kv_transfer_start_time_s, p.kv_transfer_end_time_s),
        "decode": (d.queued_time_s, d.preallocation_end_time_s, d.kv_transfer_end_time_s, d.first_token_time_s),
    }.items():
        assert None not in times_s, name
        # Of the processes' clocks: SGLang's is calibrated now and then.
        known_s = [before_s - 0.1, *(t for t in times_s if t is not None), after_s + 0.1]
        assert known_s == sorted(known_s), name
    # Decode may not know when KV began to move. What it reports is no moment at which nothing was computed yet.
    if d.kv_transfer_start_time_s is not None and p.prefill_start_time_s is not None:
        assert d.kv_transfer_start_time_s >= p.prefill_start_time_s
    assert p.preallocation_end_time_s is None
    assert d.bootstrap_end_time_s is None


async def test_continuation_over_the_pair(pair: Pair, fleet: Fleet) -> None:
    expected = (await fleet.reference())[65].token_ids
    _, decode = await pair.run(prompt(pair, 65) + tuple(expected[:6]), len(expected) - 6)
    assert decode.token_ids == expected[6:]


async def test_a_seed_draws_what_the_aggregated_engine_draws(pair: Pair, fleet: Fleet) -> None:
    for sampling, expected in zip(DRAWN, await fleet.drawn(), strict=True):
        prefill, decode = await pair.run(prompt(pair, DRAWN_LENGTH), sampling=sampling)
        assert decode.token_ids == expected
        assert prefill.token_ids == expected[:1]


async def test_both_legs_draw_the_same_first_token_without_a_seed(pair: Pair) -> None:
    firsts = set()
    for _ in range(6):
        prefill, decode = await pair.run(prompt(pair, DRAWN_LENGTH), 4, sampling=Sampling(temperature=2.0))
        assert prefill.token_ids == decode.token_ids[:1]
        firsts.add(decode.token_ids[0])
    assert len(firsts) > 1


async def test_rests_as_it_began(pair: Pair) -> None:
    await pair.assert_idle()
