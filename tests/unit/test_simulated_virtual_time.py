"""Engines on virtual time: runs are repeatable, hours take moments, and a deadlock is detected at once."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.generation import Bootstrap, EngineRequest, Sampling, Stopping
from tandem.domain.worker import WorkerRole
from tandem.engine.pulling import generate
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.network import MemoryNetwork
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import TandemError
from tandem.testing.fake_model import write_fake_model
from tandem.testing.virtual_time import EPOCH_TIME_S, Deadlock, LoopClock, run_virtually
from tests.unit.support.simulated_engines import AGGREGATED, DECODE, PREFILL, collect, request, room

Event = tuple[float, int, str, Any]
CHAOS = [
    {"point": "transfer_middle", "kind": "fail", "chance": 0.1},
    {"point": "bootstrap", "kind": "delay", "delay_s": 0.7, "chance": 0.2},
    {"point": "decode_step", "kind": "delay", "delay_s": 0.3, "chance": 0.01},
    {"point": "decode_step", "kind": "exhaust", "delay_s": 1.0, "nth": 100},
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


def engine_of(model_path: Path, role: WorkerRole, network: MemoryNetwork, seed: int = 0, **extra: Any) -> Any:
    settings = EngineSettings(
        role=role, model_path=model_path, model_name="m", kv_capacity_tokens=1024, seed=seed, extra=extra
    )
    return SimulatedEngine(settings, LoopClock(), network)


async def pair_under_load(model_path: Path, seed: int) -> list[Event]:
    """Everything that 60 requests to a pair saw, in order, with its time."""
    network, draw = MemoryNetwork(), random.Random(seed)
    extra = {"jitter": 0.3, "decode_step_s": 0.02, "prefill_tokens_per_s": 2_000, "chunked_prefill_tokens": 64}
    prefill = engine_of(model_path, PREFILL, network, seed, transfer_bytes_per_s=1e6, faults=CHAOS[:2], **extra)
    decode = engine_of(model_path, DECODE, network, seed + 1, faults=CHAOS[2:], **extra)
    await prefill.start()
    await decode.start()
    history: list[Event] = []
    clock = asyncio.get_running_loop()
    vocabulary = read_vocabulary(read_checkpoint(model_path))

    async def leg(number: int, engine: SimulatedEngine, what: EngineRequest) -> None:
        tokens: list[int] = []
        try:
            async for batch in generate(engine, what):
                tokens += batch.token_ids
                history.append((clock.time(), number, "batch", (batch.token_ids, str(batch.finish))))
        except TandemError as problem:
            history.append((clock.time(), number, type(problem).__name__, str(problem)))
        assert tokens == expected_tokens(vocabulary, what.token_ids, len(tokens)), "lost, repeated or crossed"

    async def abort(engine: SimulatedEngine, request_id: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        history.append((clock.time(), 0, "abort", (request_id, engine.abort(request_id))))

    address = prefill.bootstrap_address()
    async with asyncio.TaskGroup() as group:
        for number in range(1, 61):
            await asyncio.sleep(draw.expovariate(20))
            what = EngineRequest(
                request_id=f"request-{number}",
                token_ids=tuple(draw.randrange(20, 300) for _ in range(draw.randrange(1, 300))),
                sampling=Sampling(temperature=0.0),
                stopping=Stopping(max_tokens=draw.randrange(1, 60)),
                bootstrap=Bootstrap(host=address.host, port=address.port, room=number),
            )
            for engine in (prefill, decode):
                group.create_task(leg(number, engine, what))
                if draw.random() < 0.1:
                    group.create_task(abort(engine, what.request_id, draw.random()))
    await asyncio.sleep(60)
    for engine in (prefill, decode):
        load = await engine.load()
        assert (load.running_requests, load.waiting_requests, load.transferring_requests) == (0, 0, 0)
        assert load.kv_used_tokens == 0
        assert load.kv_free_tokens + load.kv_cached_tokens == load.kv_capacity_tokens
        assert engine.faults.fired, "a run without faults says nothing about them"
        await engine.stop()
    return history


def test_the_same_seeds_make_the_same_history(model_path: Path) -> None:
    one, same, other = (run_virtually(pair_under_load(model_path, seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    kinds = {kind for _, _, kind, _ in one}
    assert kinds == {"batch", "abort", "LegFailed"}


def test_hours_pass_in_moments(model_path: Path) -> None:
    async def slow() -> float:
        engine = engine_of(model_path, AGGREGATED, MemoryNetwork(), decode_step_s=60.0)
        await engine.start()
        tokens, finish = await collect(engine, request(max_tokens=100))
        assert len(tokens) == 100
        await engine.stop()
        assert finish.timings is not None
        assert finish.timings.queued_time_s == EPOCH_TIME_S
        return asyncio.get_running_loop().time()

    begin_s = time.monotonic()
    assert run_virtually(slow()) == pytest.approx(99 * 60, abs=0.1)
    assert time.monotonic() - begin_s < 5


def test_a_wait_that_cannot_end_is_found(model_path: Path) -> None:
    async def stuck() -> None:
        engine = engine_of(model_path, AGGREGATED, MemoryNetwork(), faults=[{"point": "admit", "kind": "hang"}])
        await engine.start()
        await collect(engine, request())

    with pytest.raises(Deadlock):
        run_virtually(stuck())


def test_connecting_to_an_unused_port_in_memory_fails(model_path: Path) -> None:
    async def lonely() -> str:
        engine = engine_of(model_path, DECODE, MemoryNetwork())
        await engine.start()
        prefill = engine_of(model_path, PREFILL, MemoryNetwork())
        await prefill.start()
        try:
            await collect(engine, request(bootstrap=room(prefill)))
        except TandemError as problem:
            return str(problem)
        finally:
            await engine.stop()
            await prefill.stop()
        return ""

    assert "cannot connect to the prefill engine at" in run_virtually(lonely())


async def handed_over(model_path: Path, prompts: list[int], **options: Any) -> list[tuple[float, float, float]]:
    """Of requests of so many prompt tokens, sent at once: when prefill was through, and when the KV began and ended."""
    network = MemoryNetwork()
    prefill = engine_of(model_path, PREFILL, network, **options)
    decode = engine_of(model_path, DECODE, network)
    await prefill.start()
    await decode.start()
    legs = []
    for place, length in enumerate(prompts):
        where, tokens = room(prefill), tuple(range(20 + place, 20 + place + length))
        legs += [collect(engine, request(tokens, bootstrap=where)) for engine in (decode, prefill)]
    finishes = [finish for _, finish in await asyncio.gather(*legs)]
    await prefill.stop()
    await decode.stop()
    times = []
    for decoded, prefilled in zip(finishes[::2], finishes[1::2], strict=True):
        p, d = prefilled.timings, decoded.timings
        assert p is not None
        assert d is not None
        assert d.kv_transfer_bytes == p.kv_transfer_bytes
        moments = (p.prefill_end_time_s, p.kv_transfer_start_time_s, d.kv_transfer_end_time_s)
        times.append(tuple(round(moment - EPOCH_TIME_S, 3) for moment in moments if moment is not None))
    return times  # type: ignore[return-value]


def test_kv_moves_while_the_next_chunk_is_computed(model_path: Path) -> None:
    # Chunks of 16 tokens take 1 s each; a page of 16 tokens, 8,192 bytes, takes 0.5 s.
    options = {"prefill_tokens_per_s": 16, "chunked_prefill_tokens": 16, "transfer_bytes_per_s": 16_384}
    assert run_virtually(handed_over(model_path, [80], **options)) == [(5.0, 1.0, 5.5)]
    # Computed in one go, nothing can move before.
    options["chunked_prefill_tokens"] = 160
    assert run_virtually(handed_over(model_path, [80], **options)) == [(5.0, 5.0, 7.5)]


def test_hand_overs_share_one_bandwidth(model_path: Path) -> None:
    options = {"prefill_tokens_per_s": 1e9, "transfer_bytes_per_s": 16_384, "transfer_latency_s": 0.25}
    times = run_virtually(handed_over(model_path, [32, 32], **options))
    # Each moves in two halves, with the latency once: 0.75 s and 0.5 s, in turn.
    assert sorted(end_s for _, _, end_s in times) == [2.0, 2.5]


def test_pages_that_are_not_full_are_moved_whole_and_once(model_path: Path) -> None:
    options = {"prefill_tokens_per_s": 16, "chunked_prefill_tokens": 16, "transfer_bytes_per_s": 16_384}
    assert run_virtually(handed_over(model_path, [17], **options)) == [(1.062, 1.0, 2.0)]
