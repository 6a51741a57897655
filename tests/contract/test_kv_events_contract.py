"""KV events: the mirror of the prefix cache follows the engine, and equals what the engine itself has cached."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import WorkerRole
from tandem.engine.port import KvEvent
from tandem.testing.eventually import assert_eventually
from tests.contract.support.engine_process import EngineProcess, RemoteError
from tests.contract.support.fleet import Fleet, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]

PAGE = 16
CAPACITY_TOKENS = 2048
"""A pool that a few prompts fill, so that blocks are evicted."""


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def engine(fleet: Fleet) -> AsyncIterator[EngineProcess]:
    """One engine for this module, with pages of 16 tokens."""
    extra = {"simulated": {"page_size_tokens": PAGE}, "sglang": {"page_size": PAGE}}[fleet.name]
    yield await fleet.caching(WorkerRole.AGGREGATED, CAPACITY_TOKENS, extra)


async def cached_of(engine: EngineProcess) -> set[int]:
    """The mirror's contents, once they equal the engine's own."""

    async def both() -> tuple[set[int], set[int]]:
        return await engine.read_kv_cache(), await engine.kv_cache()

    own, mirrored = await assert_eventually(both, lambda seen: seen[0] == seen[1], what="mirror equal to the engine")
    assert own == mirrored
    return own


async def run(engine: EngineProcess, prompt: Sequence[int], max_tokens: int = 8, salt: str | None = None) -> list[int]:
    """Generate; returns the tokens whose KV was computed."""
    request = dataclasses.replace(request_of(tuple(prompt), max_tokens), cache_salt=salt)
    result = await engine.generate(request).all()
    return [*prompt, *result.token_ids[:-1]]


async def flushed(engine: EngineProcess) -> None:
    assert await assert_eventually(engine.flush_cache, what="a flush")
    assert await cached_of(engine) == set()


async def next_sequence(engine: EngineProcess) -> int:
    sequence: int = await engine.call("kv_sequence")
    return sequence + 1


async def test_a_prompts_blocks_have_the_hashes_of_the_rule(engine: EngineProcess) -> None:
    await flushed(engine)
    begin = await next_sequence(engine)
    tokens = await run(engine, prompt_of(300, engine.capabilities.vocabulary_size, seed=1))
    hashes = block_hashes(tokens, PAGE)
    assert await cached_of(engine) == set(hashes)
    (event,) = stored = await events_from(engine, begin)
    assert (event.kind, event.parent_block_hash, event.block_size_tokens) == ("stored", None, PAGE)
    assert [h for e in stored for h in e.block_hashes][: len(hashes)] == hashes
    assert list(event.token_ids) == tokens[: len(hashes) * PAGE]


async def events_from(engine: EngineProcess, begin: int) -> list[KvEvent]:
    """All events since then; chains of one prompt in one event, as far as engines send them in parts."""
    events = await engine.kv_events(begin, await next_sequence(engine) - begin)
    whole: list[KvEvent] = []
    for event in events:
        before = whole[-1] if whole else None
        if (
            before is not None
            and event.kind == before.kind == "stored"
            and event.parent_block_hash == before.block_hashes[-1]
        ):
            whole[-1] = dataclasses.replace(
                before,
                block_hashes=[*before.block_hashes, *event.block_hashes],
                token_ids=[*before.token_ids, *event.token_ids],
            )
        else:
            whole.append(event)
    return whole


async def test_a_repeated_prompt_makes_no_event(engine: EngineProcess) -> None:
    prompt = prompt_of(300, engine.capabilities.vocabulary_size, seed=2)
    await run(engine, prompt)
    before = await cached_of(engine)
    begin = await next_sequence(engine)
    await run(engine, prompt)
    assert await cached_of(engine) == before
    assert await next_sequence(engine) == begin


async def test_a_salt_keeps_blocks_apart(engine: EngineProcess) -> None:
    await flushed(engine)
    prompt = prompt_of(100, engine.capabilities.vocabulary_size, seed=3)
    expected: set[int] = set()
    for salt in (None, "tenant-a", "tenant-b"):
        expected |= set(block_hashes(await run(engine, prompt, salt=salt), PAGE, salt))
        assert await cached_of(engine) == expected
    assert len(expected) == 3 * (107 // PAGE)


async def test_a_flush_clears_the_cache(engine: EngineProcess) -> None:
    await run(engine, prompt_of(100, engine.capabilities.vocabulary_size, seed=4))
    assert await cached_of(engine)
    begin = await next_sequence(engine)
    await flushed(engine)
    assert [event.kind for event in await events_from(engine, begin)][:1] == ["cleared"]


async def test_blocks_are_removed_under_pressure(engine: EngineProcess) -> None:
    await flushed(engine)
    size = engine.capabilities.vocabulary_size
    first = block_hashes(await run(engine, prompt_of(600, size, seed=5)), PAGE)
    begin = await next_sequence(engine)
    for seed in (6, 7, 8):
        await run(engine, prompt_of(600, size, seed=seed))
    cached = await cached_of(engine)
    assert not set(first) <= cached
    gone = {h for event in await events_from(engine, begin) if event.kind == "removed" for h in event.block_hashes}
    assert set(first) - cached <= gone


async def test_mirror_equals_the_engine_after_a_random_workload(engine: EngineProcess) -> None:
    draw = random.Random(18)
    size = engine.capabilities.vocabulary_size
    contexts = [list(prompt_of(draw.randrange(20, 500), size, seed=100 + i)) for i in range(5)]
    for turn in range(12):
        context = draw.choice(contexts)
        more = prompt_of(draw.randrange(1, 60), size, seed=200 + turn)
        prompt = [*context, *more][:700]
        salt = draw.choice((None, None, "tenant-a"))
        tokens = await run(engine, prompt, draw.randrange(1, 20), salt)
        if draw.random() < 0.5:
            contexts[draw.randrange(len(contexts))] = tokens[:600]
    cached = await cached_of(engine)
    assert cached
    assert len(cached) * PAGE <= engine.capabilities.kv_capacity_tokens


@pytest.mark.parametrize("replays", [True, False])
async def test_lost_messages_are_repaired(engine: EngineProcess, fleet: Fleet, replays: bool) -> None:
    if fleet.name == "simulated":
        pytest.skip("loses its events by an option, see tests/unit/test_simulated_engine.py")
    await flushed(engine)
    begin = await next_sequence(engine)
    await engine.call("drop_kv_messages", 2, replays)
    size = engine.capabilities.vocabulary_size
    expected: set[int] = set()
    for seed in (31, 32, 33):
        expected |= set(block_hashes(await run(engine, prompt_of(200, size, seed=seed)), PAGE))
    assert await cached_of(engine) == expected
    if not replays:
        with pytest.raises(RemoteError, match=f"{begin} is no longer kept"):
            await engine.kv_events(begin, 1)
    await engine.call("drop_kv_messages", 0, True)
