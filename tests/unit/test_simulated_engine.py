"""One simulated engine beyond the contract: injected faults, its queue, its cache, its rejections."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.generation import Bootstrap, EngineRequest, FinishReason, Guided, Sampling, Stopping
from tandem.domain.kv_blocks import block_hashes
from tandem.engine.port import KvEvent, KvSnapshot, KvUnknown
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.errors import ConfigError, EngineFailed, InvalidRequest, NotSupported, StartError
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import EOS_TOKEN_ID, write_fake_model
from tests.unit.support.simulated_engines import (
    AGGREGATED,
    DECODE,
    PREFILL,
    PROMPT,
    collect,
    expected,
    request,
    room,
    running,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


async def test_tokens_are_the_published_function(model_path: Path) -> None:
    async with running(model_path, AGGREGATED) as engine:
        tokens, _ = await collect(engine, request())
    assert tokens == expected(model_path, PROMPT, 8)


async def test_fault_at_decode(model_path: Path) -> None:
    async with running(model_path, AGGREGATED, faults=[{"point": "decode_step", "kind": "fail"}]) as engine:
        with pytest.raises(EngineFailed):
            await collect(engine, request())
        await assert_eventually(engine.load, lambda load: load.kv_used_tokens == 0)


async def test_end_of_sequence(model_path: Path) -> None:
    async with running(model_path, AGGREGATED, eos_after_tokens=3) as engine:
        tokens, finish = await collect(engine, request())
        assert (tokens[-1], len(tokens)) == (EOS_TOKEN_ID, 3)
        assert (finish.reason, finish.matched_token_id) == (FinishReason.STOP, EOS_TOKEN_ID)
        assert (await collect(engine, request(ignore_eos=True)))[1].completion_tokens == 8
        assert (await collect(engine, request(min_tokens=3)))[1].completion_tokens == 8
        assert (await collect(engine, request(min_tokens=2)))[1].completion_tokens == 3


async def test_a_request_that_does_not_fit_waits_in_turn(model_path: Path) -> None:
    prompts = [tuple(range(20 + place, 60 + place)) for place in range(3)]
    async with running(model_path, AGGREGATED, kv_capacity_tokens=128, decode_step_s=0.01) as engine:
        legs = [asyncio.create_task(collect(engine, request(prompt, max_tokens=40))) for prompt in prompts]
        await asyncio.sleep(0.05)
        load = await engine.load()
        assert (load.running_requests, load.waiting_requests, load.waiting_tokens) == (1, 2, 2 * len(PROMPT))
        assert load.kv_used_tokens in (48, 64, 80), "the prompt's pages and one or two more"
        assert all(finish.completion_tokens == 40 for _, finish in await asyncio.gather(*legs))
        tokens, finish = await collect(engine, request(max_tokens=1000))
        assert (finish.reason, len(tokens)) == (FinishReason.LENGTH, 128 - len(PROMPT))
        with pytest.raises(InvalidRequest):
            await collect(engine, request(tuple(range(20, 148))))


async def test_load_accounts_for_every_page(model_path: Path) -> None:
    slow = {"transfer_bytes_per_s": 48 * 512, "decode_step_s": 0.05}
    async with running(model_path, PREFILL, **slow) as prefill, running(model_path, DECODE, **slow) as decode:
        where = room(prefill)
        legs = [asyncio.create_task(collect(e, request(max_tokens=30, bootstrap=where))) for e in (prefill, decode)]
        for engine in (prefill, decode):
            load = await assert_eventually(engine.load, lambda load: load.kv_transferring_tokens == 48)
            assert (load.kv_used_tokens, load.kv_cached_tokens, load.kv_free_tokens) == (48, 0, 16_384 - 48)
        load = await assert_eventually(decode.load, lambda load: load.running_requests)
        assert (load.kv_transferring_tokens, load.transferring_requests) == (0, 0)
        assert load.kv_used_tokens in (48, 64, 80)
        load = await assert_eventually(prefill.load, lambda load: load.kv_used_tokens == 0)
        assert (load.kv_cached_tokens, load.kv_free_tokens) == (32, 16_384 - 32)
        await asyncio.gather(*legs)


async def test_kv_events_follow_the_cache(model_path: Path) -> None:
    async with running(model_path, AGGREGATED) as engine:
        await collect(engine, request())
        assert await engine.flush_cache()
        events = engine.kv_cache().events(1)
        stored, cleared = await anext(events), await anext(events)
        assert (stored.kind, stored.sequence, tuple(stored.token_ids[:32])) == ("stored", 1, PROMPT[:32])
        assert list(stored.block_hashes) == block_hashes(stored.token_ids, 16)
        assert (cleared.kind, cleared.sequence) == ("cleared", 2)
    for role, options in ((DECODE, {}), (AGGREGATED, {"kv_events": False}), (AGGREGATED, {"prefix_cache": False})):
        async with running(model_path, role, **options) as engine:
            with pytest.raises(NotSupported):
                engine.kv_cache()


async def test_lost_kv_events_are_noticed_and_repaired(model_path: Path) -> None:
    async with running(model_path, AGGREGATED, kv_event_loss=0.3, kv_capacity_tokens=256) as engine:
        mirror, kinds = engine.kv_cache(), set()

        async def watch() -> None:
            async for update in mirror.follow():
                kinds.add(type(update))

        watching = asyncio.create_task(watch())
        for begin in range(20):
            await collect(engine, request(tuple(range(begin, begin + 50))))
        own = set((await engine.read_kv_cache()).block_hashes)
        await assert_eventually(
            lambda: (mirror.is_known, set(mirror.snapshot().block_hashes)), lambda seen: seen == (True, own)
        )
        watching.cancel()
        assert kinds == {KvSnapshot, KvEvent, KvUnknown}, "losses were announced, and repaired by new snapshots"


async def test_decode_with_a_prefix_cache_receives_only_the_rest(model_path: Path) -> None:
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE, decode_prefix_cache=True) as decode:
        moved, cached = [], []
        longer = (*PROMPT[:32], *range(100, 120))
        for prompt in (PROMPT, PROMPT, longer):
            where = room(prefill)
            legs = (collect(engine, request(prompt, bootstrap=where)) for engine in (prefill, decode))
            (_, sent), (_, received) = await asyncio.gather(*legs)
            assert sent.timings is not None
            assert received.timings is not None
            assert sent.timings.kv_transfer_bytes == received.timings.kv_transfer_bytes
            moved.append((received.timings.kv_transfer_bytes or 0) // (16 * 512))
            cached.append(received.cached_tokens)
        pages = -(-len(PROMPT) // 16)
        assert (moved, cached) == ([pages, pages - 2, 2], [0, 32, 32])
        found = await decode.read_kv_cache()
        assert set(found.block_hashes) == set(decode.kv_cache().snapshot().block_hashes) >= {*block_hashes(longer, 16)}


async def test_flush_is_refused_while_a_request_runs(model_path: Path) -> None:
    async with running(model_path, AGGREGATED, decode_step_s=0.3) as engine:
        leg = asyncio.create_task(collect(engine, request()))
        await assert_eventually(engine.load, lambda load: load.running_requests)
        assert not await engine.flush_cache()
        leg.cancel()
        await asyncio.wait((leg,))
        assert not await engine.flush_cache(), "the step in hand still holds its pages"
        await assert_eventually(engine.flush_cache)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stopping.max_tokens", {"stopping": Stopping(max_tokens=0)}),
        ("stopping.min_tokens", {"stopping": Stopping(max_tokens=2, min_tokens=3)}),
        ("bootstrap", {"bootstrap": Bootstrap(host="h", port=1, room=1)}),
    ],
)
async def test_refusals_name_the_field(model_path: Path, field: str, change: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "request_id": "r",
        "token_ids": PROMPT,
        "sampling": Sampling(),
        "stopping": Stopping(max_tokens=2),
    }
    async with running(model_path, AGGREGATED) as engine:
        with pytest.raises(InvalidRequest) as caught:
            await collect(engine, EngineRequest(**{**base, **change}))
        assert caught.value.field == field
        with pytest.raises(NotSupported):
            await collect(engine, EngineRequest(**{**base, "guided": Guided(regex="a+")}))


async def test_an_id_runs_once(model_path: Path) -> None:
    async with running(model_path, AGGREGATED, decode_step_s=0.05) as engine:
        twice = request()
        leg = asyncio.create_task(collect(engine, twice))
        await assert_eventually(engine.load, lambda load: load.running_requests)
        with pytest.raises(InvalidRequest, match="request_id"):
            await collect(engine, twice)
        assert (await leg)[1].completion_tokens == 8


async def test_starts_that_cannot_work(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="model: there is no directory"):
        async with running(tmp_path / "nowhere", AGGREGATED):
            pass
    with pytest.raises(StartError, match="two pages"):
        async with running(model_path, AGGREGATED, kv_capacity_tokens=16):
            pass
    with pytest.raises(ConfigError, match="eos_after_tokens"):
        async with running(write_fake_model(tmp_path / "m", eos_token_id=None), AGGREGATED, eos_after_tokens=1):
            pass
    async with running(model_path, PREFILL) as prefill:
        address = prefill.bootstrap_address()
        assert address is not None
        again = EngineSettings(role=PREFILL, model_path=model_path, model_name="m", bootstrap_port=address.port)
        with pytest.raises(StartError, match=str(address.port)):
            await SimulatedEngine(again).start()


async def test_kv_bytes_follow_the_dtype(model_path: Path) -> None:
    for dtype, kv_bytes in (("auto", 512), ("float32", 512), ("bfloat16", 256)):
        async with running(model_path, AGGREGATED, dtype=dtype) as engine:
            assert engine.capabilities().kv_bytes_per_token == kv_bytes


async def test_a_stopped_engine_rejects_calls() -> None:
    engine = SimulatedEngine(EngineSettings(role=AGGREGATED, model_path=Path("x"), model_name="m"))
    await engine.stop()
    with pytest.raises(EngineFailed, match="not running"):
        await collect(engine, request())
    with pytest.raises(EngineFailed, match="not started"):
        engine.capabilities()
