"""The engine port on one aggregated engine: streams, ends, rejections, the prefix cache."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tandem.domain.generation import FinishReason
from tests.contract.support.engine_process import EngineProcess, RemoteError, Result
from tests.contract.support.fleet import CONCURRENT, Fleet, assert_idle, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

LONG = 1000
PROMPT_TOKENS = 40


@pytest_asyncio.fixture(loop_scope="session")
async def engine(fleet: Fleet) -> EngineProcess:
    return await fleet.aggregated()


def prompt(engine: EngineProcess, length: int = PROMPT_TOKENS, seed: int = 1) -> tuple[int, ...]:
    return prompt_of(length, engine.capabilities.vocabulary_size, seed)


async def greedy(engine: EngineProcess, count: int = 24) -> list[int]:
    return (await engine.generate(request_of(prompt(engine), count)).all()).token_ids


def assert_ordered(*times_s: float | None) -> None:
    known = [t for t in times_s if t is not None]
    assert known == sorted(known), times_s


async def test_ends_once_and_counts_what_it_emitted(engine: EngineProcess) -> None:
    result = await engine.generate(request_of(prompt(engine), 24)).all()
    assert len(result.token_ids) == 24
    assert all(0 <= t < engine.capabilities.vocabulary_size for t in result.token_ids)
    assert result.finish.reason is FinishReason.LENGTH
    assert result.finish.matched_token_id is None
    assert (result.finish.prompt_tokens, result.finish.completion_tokens) == (PROMPT_TOKENS, 24)


async def test_streams_while_it_generates(engine: EngineProcess) -> None:
    result = await engine.generate(request_of(prompt(engine), 24)).all()
    assert len([b for b in result.batches if b.token_ids]) >= 6
    assert all(not b.logprobs for b in result.batches), "log probabilities without a request for them"


async def test_greedy_repeats_itself(engine: EngineProcess) -> None:
    assert await greedy(engine) == await greedy(engine)


async def test_continuation_emits_what_the_undisturbed_run_would_have(engine: EngineProcess) -> None:
    whole = await greedy(engine)
    for sent in (1, 7, 23):
        rest = await engine.generate(request_of(prompt(engine) + tuple(whole[:sent]), 24 - sent)).all()
        assert rest.token_ids == whole[sent:]


async def test_concurrent_requests_do_not_mix(engine: EngineProcess, fleet: Fleet) -> None:
    reference = await fleet.reference()
    lengths = sorted(reference)[-CONCURRENT:]
    requests = [request_of(prompt_of(n, engine.capabilities.vocabulary_size)) for n in lengths]
    results = await asyncio.gather(*(engine.generate(request).all() for request in requests))
    assert [r.token_ids for r in results] == [reference[n].token_ids for n in lengths]
    assert all(r.finish.completion_tokens == len(r.token_ids) for r in results)


async def test_one_token(engine: EngineProcess) -> None:
    result = await engine.generate(request_of(prompt(engine), 1)).all()
    assert result.token_ids == (await greedy(engine))[:1]
    assert (result.finish.reason, result.finish.completion_tokens) == (FinishReason.LENGTH, 1)


async def test_stop_token_ends_and_is_the_last_token(engine: EngineProcess) -> None:
    tokens = await greedy(engine)
    place = max(i for i, t in enumerate(tokens) if t not in tokens[:i])
    request = request_of(prompt(engine), 24, stop_token_ids=(tokens[place],), ignore_eos=False)
    result = await engine.generate(request).all()
    assert result.token_ids == tokens[: place + 1]
    assert (result.finish.reason, result.finish.matched_token_id) == (FinishReason.STOP, tokens[place])


async def test_min_tokens_holds_back_a_stop_token(engine: EngineProcess) -> None:
    stop = (await greedy(engine))[0]
    request = request_of(prompt(engine), 24, stop_token_ids=(stop,), min_tokens=6, ignore_eos=False)
    result = await engine.generate(request).all()
    assert len(result.token_ids) > 6
    assert stop not in result.token_ids[:6]


async def test_context_ends_with_length(engine: EngineProcess) -> None:
    context = engine.capabilities.context_tokens_max
    result = await engine.generate(request_of(prompt(engine, context - 20), 100)).all()
    assert result.finish.reason is FinishReason.LENGTH
    assert 1 <= len(result.token_ids) <= 20
    await assert_idle(engine)


async def test_logprobs_belong_to_the_tokens(engine: EngineProcess) -> None:
    result = await engine.generate(request_of(prompt(engine), 12, top_logprobs=3)).all()
    assert [p.token_id for p in result.logprobs] == result.token_ids
    for chosen in result.logprobs:
        assert chosen.logprob <= 0
        assert len(chosen.top) == 3
        assert chosen.top[0] == pytest.approx((chosen.token_id, chosen.logprob), abs=1e-5)
        assert [p for _, p in chosen.top] == sorted((p for _, p in chosen.top), reverse=True)


async def test_logprobs_of_the_prompt(engine: EngineProcess) -> None:
    given = prompt(engine, seed=77)
    first = await engine.generate(request_of(given, 1, top_logprobs=2)).all()
    assert first.finish.prompt_logprobs == ()
    longer = (*given, *first.token_ids)
    for _ in range(2):  # the second time all of it is in the prefix cache
        result = await engine.generate(request_of(longer, 3, top_logprobs=2, prompt_logprobs=True)).all()
        entries = result.finish.prompt_logprobs
        assert tuple(entry.token_id for entry in entries) == longer[1:]
        assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in entries)
        # What the engine chose after the shorter prompt, it rates alike as a part of the longer one.
        assert entries[-1].logprob == pytest.approx(first.logprobs[0].logprob, abs=1e-3)
        assert entries[-1].top[0][0] == first.token_ids[0]
        assert len(result.token_ids) == len(result.logprobs) == 3


async def test_logprobs_without_rivals(engine: EngineProcess) -> None:
    result = await engine.generate(request_of(prompt(engine), 4, top_logprobs=0)).all()
    assert [p.token_id for p in result.logprobs] == result.token_ids
    assert all(p.top == () and p.logprob <= 0 for p in result.logprobs)


async def test_timings_are_ordered_and_now(engine: EngineProcess) -> None:
    before_s = time.time()
    timings = (await engine.generate(request_of(prompt(engine), 4)).all()).finish.timings
    assert timings is not None
    assert timings.queued_time_s is not None
    assert timings.prefill_end_time_s is not None
    assert timings.first_token_time_s is not None
    assert_ordered(
        before_s - 0.1,
        timings.queued_time_s,
        timings.prefill_start_time_s,
        timings.prefill_end_time_s,
        timings.first_token_time_s,
        time.time() + 0.1,
    )


async def test_aggregated_moves_no_kv(engine: EngineProcess) -> None:
    finish = (await engine.generate(request_of(prompt(engine), 4)).all()).finish
    assert finish.timings is not None
    assert finish.timings.kv_transfer_bytes is None
    assert engine.capabilities.transfer_backend == "none"
    assert engine.bootstrap is None


async def test_prefix_cache_grows_and_is_flushed(engine: EngineProcess) -> None:
    async def cached_tokens() -> int:
        return (await engine.generate(request_of(prompt(engine, 200, seed=7), 4)).all()).finish.cached_tokens

    await assert_idle(engine)
    assert await cached_tokens() == 0
    page = engine.capabilities.page_size_tokens
    assert 199 - page < await cached_tokens() <= 199
    await assert_idle(engine)
    assert await cached_tokens() == 0, "flush_cache kept something"


@pytest.mark.parametrize("how", ["abort", "cancel", "close"])
async def test_ending_early_frees_everything(engine: EngineProcess, how: str) -> None:
    generation = engine.generate(request_of(prompt(engine), LONG), close_after=5 if how == "close" else None)
    await generation.tokens(3)
    start_s = time.monotonic()
    if how == "abort":
        assert await engine.abort(generation.request.request_id)
        result = await generation.all()
        assert result.finish.reason is FinishReason.ABORTED
        assert result.finish.completion_tokens >= 3
    elif how == "cancel":
        assert await generation.cancel()
        with pytest.raises(RemoteError, match="CancelledError"):
            await generation.all()
    else:
        await generation.all()
        assert generation.result.finishes == []
    assert time.monotonic() - start_s < 2
    assert len(generation.result.token_ids) < LONG
    await assert_idle(engine, within_s=2)
    assert len(await greedy(engine)) == 24


async def test_abort_of_what_is_not_there(engine: EngineProcess) -> None:
    assert not await engine.abort("contract-never-was")
    request = request_of(prompt(engine), 2)
    await engine.generate(request).all()
    assert not await engine.abort(request.request_id)


async def test_abort_hits_only_its_request(engine: EngineProcess) -> None:
    # Long enough not to be over before the abort arrives.
    stays, goes = (engine.generate(request_of(prompt(engine), count)) for count in (200, 1_500))
    await goes.tokens(2)
    assert await engine.abort(goes.request.request_id)
    assert (await goes.all()).finish.reason is FinishReason.ABORTED
    assert (await stays.all()).finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize("wrong", ["vocabulary", "negative", "context", "empty"])
async def test_refuses_a_wrong_prompt_by_name(engine: EngineProcess, wrong: str) -> None:
    tokens = {
        "vocabulary": (*prompt(engine), engine.capabilities.vocabulary_size),
        "negative": (*prompt(engine), -1),
        "context": prompt(engine, engine.capabilities.context_tokens_max + 1),
        "empty": (),
    }[wrong]
    with pytest.raises(RemoteError) as caught:
        await engine.generate(request_of(tokens, 4)).all()
    name = "ContextExceeded" if wrong == "context" else "InvalidRequest"
    assert (caught.value.name, caught.value.metadata.get("field")) == (name, "token_ids")
    assert len(await greedy(engine)) == 24


async def test_the_whole_context_can_be_used(engine: EngineProcess) -> None:
    context = engine.capabilities.context_tokens_max
    for left in (1, 2, 6):
        result = await engine.generate(request_of(prompt(engine, context - left), 50)).all()
        assert (len(result.token_ids), result.finish.reason) == (left, FinishReason.LENGTH)
    with pytest.raises(RemoteError) as caught:
        await engine.generate(request_of(prompt(engine, context), 1)).all()
    assert (caught.value.name, caught.value.metadata) == (
        "ContextExceeded",
        {"field": "token_ids", "limit": str(context)},
    )
    await assert_idle(engine)


@pytest.mark.parametrize("count", [-5, 21, 2000])
async def test_refuses_a_wrong_count_of_rivals(engine: EngineProcess, count: int) -> None:
    with pytest.raises(RemoteError) as caught:
        await engine.generate(request_of(prompt(engine), 4, top_logprobs=count)).all()
    assert (caught.value.name, caught.value.metadata["field"]) == ("InvalidRequest", "logprobs.top_logprobs")
    assert len(await greedy(engine)) == 24


async def test_load_counts_running_requests(engine: EngineProcess) -> None:
    await assert_idle(engine)
    generation = engine.generate(request_of(prompt(engine), LONG))
    await generation.tokens(3)
    load = await engine.load()
    assert load.running_requests == 1
    assert load.kv_used_tokens is None or load.kv_used_tokens >= PROMPT_TOKENS
    assert load.kv_capacity_tokens in (None, engine.capabilities.kv_capacity_tokens)
    assert await engine.abort(generation.request.request_id)
    await generation.all()
    await assert_idle(engine)


async def test_more_requests_than_slots_all_end(engine: EngineProcess) -> None:
    count = engine.capabilities.running_requests_max + 8
    requests = [request_of(prompt(engine, 20, seed=i), 8) for i in range(count)]
    results: list[Result] = await asyncio.gather(*(engine.generate(request).all() for request in requests))
    assert [len(r.token_ids) for r in results] == [8] * count
    assert all(r.finish.reason is FinishReason.LENGTH for r in results)
    await assert_idle(engine)


async def test_capabilities_are_sane(engine: EngineProcess, fleet: Fleet) -> None:
    c = engine.capabilities
    assert (c.engine, c.model, c.kv_dtype) == (fleet.name, "contract", "float32")
    assert len(c.model_digest) == len(c.tokenizer_digest) == 64
    assert min(c.context_tokens_max, c.kv_capacity_tokens, c.vocabulary_size, c.page_size_tokens) > 0
    assert c.running_requests_max == 16
    assert c.engine_version
    assert c.kv_bytes_per_token > 0


async def test_reference_for_the_pair_is_taken(fleet: Fleet) -> None:
    reference = await fleet.reference()
    assert len(reference) >= 20
    assert len({tuple(r.token_ids) for r in reference.values()}) == len(reference), (
        "the streams of these prompts are not distinct"
    )

    await fleet.drawn()
