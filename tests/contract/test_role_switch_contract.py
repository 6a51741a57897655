"""Engines that take another role in place: the same processes, the same tokens, and the cache of the role."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tandem.domain.generation import KvCheck
from tandem.domain.worker import WorkerRole
from tests.contract.support.engine_process import EngineProcess, RemoteError
from tests.contract.support.fleet import REFERENCE_TOKENS, Fleet, Pair, assert_idle, prompt_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PAGE = 16
LENGTHS = (17, 100, 300)
CACHED_LENGTH = 300
SWITCH_S_MAX = 5.0
PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def reference(fleet: Fleet) -> dict[int, list[int]]:
    """The aggregated engine's tokens."""
    return {length: result.token_ids for length, result in (await fleet.reference()).items()}


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def pair(fleet: Fleet, reference: dict[int, list[int]]) -> Pair:
    return await fleet.switching_pair(PAGE)


async def assert_equal(pair: Pair, reference: dict[int, list[int]]) -> None:
    """The pair's tokens are the aggregated engine's, from KV that moved; prefill has a prefix cache, decode none."""
    size = pair.decode.capabilities.vocabulary_size
    for length in LENGTHS:
        for expected_cached in (0, (length - 1) // PAGE * PAGE):
            prefill, decode = await pair.run(prompt_of(length, size), REFERENCE_TOKENS)
            assert decode.token_ids == reference[length]
            assert prefill.finish.cached_tokens == expected_cached
            assert decode.finish.timings is not None
            assert decode.finish.timings.kv_transfer_bytes is not None
            assert decode.finish.timings.kv_transfer_bytes >= length * pair.decode.capabilities.kv_bytes_per_token
            assert not decode.finish.recomputed_tokens
            assert decode.finish.kv_check is KvCheck.MATCHED
    assert await pair.prefill.kv_cache() == await pair.prefill.read_kv_cache() != set()
    with pytest.raises(RemoteError, match=r"NotSupported.*prefix cache"):
        await pair.decode.kv_cache()
    await pair.assert_idle()


async def switch(engine: EngineProcess, role: WorkerRole) -> float:
    """Seconds that it took."""
    begin_s = time.monotonic()
    await engine.switch_role(role)
    took_s = time.monotonic() - begin_s
    assert (engine.bootstrap is not None) is (role is PREFILL)
    await engine.call("canary")
    print(f"{role.value} in {took_s:.3f} s")
    return took_s


async def test_a_pair_changes_places_and_back_and_its_tokens_stay(pair: Pair, reference: dict[int, list[int]]) -> None:
    children = [await engine.children() for engine in (pair.prefill, pair.decode)]
    await assert_equal(pair, reference)
    addresses = [pair.prefill.bootstrap]
    for _ in range(2):
        took_s = await asyncio.gather(switch(pair.prefill, DECODE), switch(pair.decode, PREFILL))
        assert max(took_s) < SWITCH_S_MAX
        pair = Pair(pair.decode, pair.prefill)
        addresses.append(pair.prefill.bootstrap)
        await assert_equal(pair, reference)
    assert len(set(addresses)) == len(addresses), (
        "decode engines keep what they know of a prefill engine by its address"
    )
    assert [await engine.children() for engine in (pair.prefill, pair.decode)] == children, "loaded again"


async def test_a_decode_engine_that_stays_finds_a_prefill_engine_that_was_away(
    pair: Pair, reference: dict[int, list[int]]
) -> None:
    size = pair.decode.capabilities.vocabulary_size
    for _ in range(2):
        _, decode = await pair.run(prompt_of(100, size))
        assert decode.token_ids == reference[100]
        await switch(pair.prefill, DECODE)
        await switch(pair.prefill, PREFILL)
    _, decode = await pair.run(prompt_of(100, size))
    assert decode.token_ids == reference[100]


async def test_a_switch_waits_for_what_aborted_requests_held(pair: Pair) -> None:
    size = pair.decode.capabilities.vocabulary_size
    legs = pair.begin(prompt_of(200, size), 400)
    await legs[1].tokens(3)
    for leg, engine in zip(legs, (pair.prefill, pair.decode), strict=True):
        await engine.abort(leg.request.request_id)
    await switch(pair.decode, PREFILL)
    await switch(pair.decode, DECODE)
    await assert_idle(pair.decode)


async def test_a_role_that_the_engine_cannot_take_in_place_changes_nothing(
    pair: Pair, reference: dict[int, list[int]]
) -> None:
    with pytest.raises(RemoteError, match=r"NotSupported.*between prefill and decode only"):
        await pair.decode.switch_role(AGGREGATED)
    _, decode = await pair.run(prompt_of(100, pair.decode.capabilities.vocabulary_size))
    assert decode.token_ids == reference[100]
