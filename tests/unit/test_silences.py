"""A leg that waits says so, and a leg that is closed while it waits is closed in its engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator

import pytest

from tandem.errors import EngineFailed
from tandem.model.generation import EngineFinish, FinishReason, TokenBatch
from tandem.worker.silences import with_silences

FINISH = TokenBatch(finish=EngineFinish(reason=FinishReason.LENGTH))


async def paced(*steps: float | TokenBatch | Exception) -> AsyncGenerator[TokenBatch, None]:
    for step in steps:
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif isinstance(step, TokenBatch):
            yield step
        else:
            raise step


def batch(token: int) -> TokenBatch:
    return TokenBatch(token_ids=(token,))


async def test_batches_pass_in_order_and_silences_are_told() -> None:
    heard = [b async for b in with_silences(paced(0.25, batch(1), batch(2), 0.15, FINISH), silence_s=0.1)]
    assert [b for b in heard if b is not None] == [batch(1), batch(2), FINISH]
    assert heard[:3] == [None, None, batch(1)]
    assert heard[3] == batch(2), "no word between batches that come at once"
    assert heard[4] is None


async def test_a_failure_passes() -> None:
    with pytest.raises(EngineFailed, match="gone"):
        async for _ in with_silences(paced(0.05, EngineFailed("gone")), silence_s=0.02):
            pass


async def test_closing_in_a_silence_closes_the_leg() -> None:
    ended = asyncio.Event()

    async def waiting() -> AsyncGenerator[TokenBatch, None]:
        try:
            yield batch(1)
            await asyncio.sleep(60)
        finally:
            ended.set()

    batches = waiting()
    async with contextlib.aclosing(with_silences(batches, silence_s=0.01)) as steps:
        async for step in steps:
            if step is None:
                break
    await batches.aclose()
    assert ended.is_set()


async def test_a_cancelled_reader_cancels_the_leg() -> None:
    ended = asyncio.Event()

    async def waiting() -> AsyncGenerator[TokenBatch, None]:
        try:
            await asyncio.sleep(60)
            yield batch(1)
        finally:
            ended.set()

    async def read() -> None:
        async for _ in with_silences(waiting(), silence_s=60):
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.02)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(ended.wait(), 1)


@pytest.mark.parametrize("last", [FINISH, EngineFailed("gone")])
async def test_a_reader_that_leaves_when_it_is_over_leaves_no_complaint(
    last: TokenBatch | EngineFailed, caplog: pytest.LogCaptureFixture
) -> None:
    over = asyncio.Event()

    async def ending() -> AsyncGenerator[TokenBatch, None]:
        await over.wait()
        if isinstance(last, EngineFailed):
            raise last
        return
        yield last

    async def read() -> None:
        async for _ in with_silences(ending(), silence_s=60):
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.02)
    over.set()
    # The step ends in the next turn of the loop, before the reader hears of it: then it is told to leave.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    assert reader.cancelled(), "void: it heard of the end"
    del reader
    gc.collect()
    assert not caplog.records
