"""What a leg's word of progress costs a worker: batches through `with_silences` and without it, in one process.

Processor time, alternately, so that a busy machine disturbs both alike. `python -m benchmarks.silences`
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from tandem.model.generation import TokenBatch
from tandem.worker.silences import with_silences

BATCHES = 20_000
ROUNDS = 5
BATCH = TokenBatch(token_ids=(1,))


async def batches() -> AsyncGenerator[TokenBatch, None]:
    """As an engine tells them: each one after a turn of the event loop."""
    loop = asyncio.get_running_loop()
    for _ in range(BATCHES):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn
        yield BATCH


async def _read(source: AsyncIterator[TokenBatch | None]) -> None:
    async for _ in source:
        pass


def cost_us(make: Callable[[], AsyncIterator[TokenBatch | None]]) -> float:
    """Microseconds of processor time for each batch."""

    async def run() -> None:
        await _read(make())

    begin_s = time.process_time()
    asyncio.run(run())
    return (time.process_time() - begin_s) / BATCHES * 1e6


def main() -> None:
    """Print the medians and their difference."""
    plain, told = [], []
    for _ in range(ROUNDS):
        plain.append(cost_us(batches))
        told.append(cost_us(lambda: with_silences(batches())))
    without_us, with_us = statistics.median(plain), statistics.median(told)
    print(f"without: {without_us:.1f} us a batch, with: {with_us:.1f} us, difference: {with_us - without_us:.1f} us")


if __name__ == "__main__":
    main()
