"""A pair whose decode engine has a prefix cache: only the rest of a prompt moves, and the tokens stay the same."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.domain.adapter import Adapter, read_adapter
from tandem.domain.generation import EngineFinish, KvCheck
from tandem.domain.kv_blocks import block_hashes
from tandem.testing.adapters import write_adapter
from tests.contract.support.engine_process import RemoteError, Result
from tests.contract.support.fleet import ADAPTERS, Fleet, Pair, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PAGE = 16
TURNS = 6
ANSWER_TOKENS = 20
FIRST_TOKENS, NEXT_TOKENS = 150, 37


@dataclass
class Chat:
    """The turns of a conversation, with the aggregated engine's answers."""

    prompts: list[tuple[int, ...]]
    answers: list[list[int]]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def chat(fleet: Fleet) -> Chat:
    engine = await fleet.aggregated()
    size = engine.capabilities.vocabulary_size
    said, chat = prompt_of(FIRST_TOKENS, size, seed=50), Chat([], [])
    for turn in range(TURNS):
        answer = (await engine.generate(request_of(said, ANSWER_TOKENS)).all()).token_ids
        chat.prompts.append(said)
        chat.answers.append(answer)
        said = (*said, *answer, *prompt_of(NEXT_TOKENS, size, seed=60 + turn))
    return chat


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def pair(fleet: Fleet, chat: Chat) -> Pair:
    return await fleet.caching_pair(PAGE)


def moved_bytes(finish: EngineFinish) -> int:
    assert finish.timings is not None
    assert finish.timings.kv_transfer_bytes is not None
    return finish.timings.kv_transfer_bytes


async def run_salted(
    pair: Pair, prompt: tuple[int, ...], salt: str | None, adapter: Adapter | None = None
) -> list[Result]:
    room = pair.room()
    plain = request_of(prompt, ANSWER_TOKENS, bootstrap=room)
    request = dataclasses.replace(plain, cache_salt=salt, adapter=adapter)
    return await asyncio.gather(*(engine.generate(request).all() for engine in (pair.prefill, pair.decode)))


async def test_a_chat_moves_the_uncached_tail_only(pair: Pair, chat: Chat) -> None:
    per_token = pair.decode.capabilities.kv_bytes_per_token
    computed = 0
    for prompt, answer in zip(chat.prompts, chat.answers, strict=True):
        prefill, decode = await pair.run(prompt, ANSWER_TOKENS)
        assert decode.token_ids == answer
        cached = decode.finish.cached_tokens
        assert cached == computed // PAGE * PAGE, "what the turn before has left"
        uncached_bytes = (len(prompt) - cached) * per_token
        assert uncached_bytes <= moved_bytes(decode.finish) < uncached_bytes + PAGE * per_token
        assert moved_bytes(prefill.finish) == moved_bytes(decode.finish)
        assert not decode.finish.recomputed_tokens
        assert (prefill.finish.kv_check, decode.finish.kv_check) == (None, KvCheck.MATCHED)
        # The last token is not computed, as no token follows it.
        computed = len(prompt) + ANSWER_TOKENS - 1
    own = await pair.decode.read_kv_cache()
    assert own == await pair.decode.kv_cache()
    assert set(block_hashes([*chat.prompts[-1], *chat.answers[-1][:-1]], PAGE)) <= own


async def test_a_repeated_prompt_moves_one_page_at_most(pair: Pair, chat: Chat) -> None:
    prompt, answer = chat.prompts[2], chat.answers[2]
    await pair.run(prompt, ANSWER_TOKENS)
    _, decode = await pair.run(prompt, ANSWER_TOKENS)
    assert decode.token_ids == answer
    assert moved_bytes(decode.finish) <= PAGE * pair.decode.capabilities.kv_bytes_per_token


async def test_a_salt_shares_nothing(pair: Pair, chat: Chat) -> None:
    prompt, answer = chat.prompts[1], chat.answers[1]
    await run_salted(pair, prompt, None)
    _, decode = await run_salted(pair, prompt, "tenant-a")
    assert (decode.token_ids, decode.finish.cached_tokens) == (answer, 0)
    assert moved_bytes(decode.finish) >= len(prompt) * pair.decode.capabilities.kv_bytes_per_token


async def test_a_cancelled_answer_leaves_right_blocks_only(pair: Pair, chat: Chat) -> None:
    prompt, answer = chat.prompts[3], chat.answers[3]
    legs = pair.begin(prompt, 400)
    await legs[1].tokens(5)
    await legs[1].cancel()
    await pair.decode.abort(legs[1].request.request_id)
    await legs[0].all()
    prefill, decode = await pair.run(prompt, ANSWER_TOKENS)
    assert decode.token_ids == answer
    assert prefill.token_ids == answer[:1]
    assert await pair.decode.read_kv_cache() == await pair.decode.kv_cache()
    await pair.assert_idle()


async def test_each_adapter_has_tokens_and_blocks_of_its_own(
    pair: Pair, chat: Chat, model_path: Path, tmp_path: Path
) -> None:
    prompt, answer = chat.prompts[0], chat.answers[0]
    adapters, tokens = [], []
    for number in range(2):
        path = write_adapter(tmp_path / str(number), model_path, number)
        adapter = read_adapter(f"a{number}", path, model_path, ADAPTERS.rank_max, ADAPTERS.modules)
        for engine in (pair.prefill, pair.decode):
            await engine.call("load_adapter", adapter, path)
        adapters.append(adapter)
    for adapter in adapters:
        prefill, decode = await run_salted(pair, prompt, None, adapter)
        assert prefill.token_ids == decode.token_ids[:1]
        assert (decode.finish.cached_tokens, prefill.finish.cached_tokens) == (0, 0), "no other one's blocks"
        tokens.append(decode.token_ids)
        blocks = set(block_hashes(prompt, PAGE, None, adapter.engine_id))
        for engine in (pair.prefill, pair.decode):
            own = await engine.read_kv_cache()
            assert blocks <= own == await engine.kv_cache()
    assert len({*map(tuple, tokens), tuple(answer)}) == 3
    again = await run_salted(pair, prompt, None, adapters[0])
    assert again[1].token_ids == tokens[0]
    assert again[0].finish.cached_tokens == (len(prompt) - 1) // PAGE * PAGE
    _, salted = await run_salted(pair, prompt, "tenant-b", adapters[0])
    assert (salted.token_ids, salted.finish.cached_tokens) == (tokens[0], 0)
    assert set(block_hashes(prompt, PAGE, "tenant-b", adapters[0].engine_id)) <= await pair.prefill.read_kv_cache()
    for engine in (pair.prefill, pair.decode):
        await engine.call("unload_adapter", adapters[0])
    with pytest.raises(RemoteError) as refused:
        await run_salted(pair, prompt, None, adapters[0])
    assert refused.value.name == "ModelNotFound"
    assert (await pair.run(prompt, ANSWER_TOKENS))[1].token_ids == answer
