"""Several generations at once, as one stream of numbered events: the choices of a request.

Reads a generation only as fast as its events are taken. The first failure ends all of them; so does leaving early.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, Sequence

from tandem_frontend.generation import Event


async def merged(generations: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all generations as they come, each with the number of its generation.

    Raises:
        TandemError: the first failure of any.
    """
    async with contextlib.AsyncExitStack() as stack:
        for generation in generations:
            await stack.enter_async_context(contextlib.aclosing(generation))
        if len(generations) == 1:
            async for event in generations[0]:
                yield 0, event
            return
        async with contextlib.aclosing(_raced(generations)) as events:
            async for numbered in events:
                yield numbered


async def _raced(generations: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    # Of each its own, kept over its steps: whatever is logged in it belongs to one request.
    contexts = [contextvars.copy_context() for _ in generations]

    def step(number: int) -> asyncio.Task[Event | None]:
        return asyncio.create_task(_next(generations[number]), context=contexts[number])

    waits = {step(number): number for number in range(len(generations))}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in sorted(done, key=waits.__getitem__):
                number = waits.pop(wait)
                event = wait.result()
                if event is not None:
                    waits[step(number)] = number
                    yield number, event
    finally:
        for wait in waits:
            wait.cancel()
        # Each must have left its generator before that can be closed.
        await asyncio.gather(*waits, return_exceptions=True)


async def _next(generation: AsyncGenerator[Event, None]) -> Event | None:
    """The next event; None after the last."""
    return await anext(generation, None)
