"""Attempts that do not finish: aborted in every phase, or waiting for a peer that never connects."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tandem.domain.generation import FinishReason
from tandem.testing.eventually import assert_eventually
from tests.contract.support.engine_process import EngineProcess, RemoteError, Result
from tests.contract.support.fleet import Fleet, Pair, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]

ABORT_BOUND_S = 2.0


@pytest_asyncio.fixture(loop_scope="session")
async def pair(fleet: Fleet) -> Pair:
    await fleet.reference()
    return await fleet.pair()


def prompt(pair: Pair, length: int = 100) -> tuple[int, ...]:
    return prompt_of(length, pair.decode.capabilities.vocabulary_size)


async def assert_pair_works(pair: Pair, fleet: Fleet) -> None:
    await pair.assert_idle()
    _, decode = await pair.run(prompt(pair))
    assert decode.token_ids == (await fleet.reference())[100].token_ids


async def assert_waiting(engine: EngineProcess) -> None:
    """The engine has the request, so that what follows ends a wait and not a beginning."""
    await assert_eventually(
        engine.load,
        lambda load: any((load.running_requests, load.waiting_requests, load.transferring_requests)),
        what="request known to the engine",
    )


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["abort", "cancel"])
async def test_leg_whose_peer_never_comes_can_be_ended(pair: Pair, fleet: Fleet, leg: str, how: str) -> None:
    engine: EngineProcess = getattr(pair, leg)
    generation = engine.generate(request_of(prompt(pair), bootstrap=pair.room()))
    await assert_waiting(engine)
    start_s = time.monotonic()
    if how == "abort":
        assert await engine.abort(generation.request.request_id)
        result = await asyncio.wait_for(generation.all(), ABORT_BOUND_S)
        assert result.finish.reason is FinishReason.ABORTED
        assert result.token_ids == []
    else:
        assert await generation.cancel()
        with pytest.raises(RemoteError, match="CancelledError"):
            await asyncio.wait_for(generation.all(), ABORT_BOUND_S)
    assert time.monotonic() - start_s < ABORT_BOUND_S
    await assert_pair_works(pair, fleet)


async def test_abort_of_both_legs_in_mid_stream(pair: Pair, fleet: Fleet) -> None:
    prefill, decode = pair.begin(prompt(pair), 1000)
    await decode.tokens(5)
    assert await pair.decode.abort(decode.request.request_id)
    result = await asyncio.wait_for(decode.all(), ABORT_BOUND_S)
    assert result.finish.reason is FinishReason.ABORTED
    assert 5 <= len(result.token_ids) < 1000
    assert (await asyncio.wait_for(prefill.all(), ABORT_BOUND_S)).finish.reason is FinishReason.LENGTH
    await assert_pair_works(pair, fleet)


async def test_closing_the_decode_iterator_aborts(pair: Pair, fleet: Fleet) -> None:
    room = pair.room()
    prefill = pair.prefill.generate(request_of(prompt(pair), 1000, bootstrap=room))
    decode = pair.decode.generate(request_of(prompt(pair), 1000, bootstrap=room), close_after=3)
    await asyncio.wait_for(decode.all(), 10)
    await prefill.all()
    assert decode.result.finishes == []
    await assert_pair_works(pair, fleet)


async def test_aborting_many_attempts_at_any_moment_leaves_nothing(pair: Pair, fleet: Fleet) -> None:
    attempts = []
    for index in range(12):
        legs = pair.begin(prompt(pair, 20 + 40 * index), 400)
        attempts.append(legs)
        await asyncio.sleep(0.005 * (index % 4))  # a spread of phases; any of them will do
        for engine, leg in zip((pair.prefill, pair.decode), legs, strict=True):
            await engine.abort(leg.request.request_id)
    endings = await asyncio.gather(
        *(asyncio.wait_for(leg.all(), 10) for legs in attempts for leg in legs), return_exceptions=True
    )
    for ending in endings:
        if isinstance(ending, RemoteError):
            # The other leg went first: a failed hand-over is an ending too.
            assert ending.name == "LegFailed", ending
        else:
            assert isinstance(ending, Result), ending
            assert ending.finish.reason in (FinishReason.ABORTED, FinishReason.LENGTH)
    await assert_pair_works(pair, fleet)


async def test_abort_of_unknown_ids(pair: Pair) -> None:
    assert not await pair.prefill.abort("contract-never-was")
    assert not await pair.decode.abort("contract-never-was")


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_leg_without_a_room_is_refused(pair: Pair, fleet: Fleet, leg: str) -> None:
    engine: EngineProcess = getattr(pair, leg)
    with pytest.raises(RemoteError) as caught:
        await engine.generate(request_of(prompt(pair))).all()
    assert (caught.value.name, caught.value.metadata.get("field")) == ("InvalidRequest", "bootstrap")
    await assert_pair_works(pair, fleet)


async def test_stop_twice(pair: Pair, fleet: Fleet) -> None:
    try:
        async with asyncio.timeout(20):
            for engine in (pair.prefill, pair.decode):
                await engine.stop()
                await engine.stop()
                assert await engine.children() == []
    finally:
        await fleet.close()
