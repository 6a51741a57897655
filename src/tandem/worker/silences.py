"""Batches of a leg, and a word in between whenever there has been none for a while.

Owns the waiting only: what is said in a silence is the leg's business. A timer and a future instead of
`asyncio.wait` for each batch, which costs twice as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from tandem.model.generation import TokenBatch

SILENCE_S = 0.4
"""A frontend gives up a leg that says nothing for several times this long."""


async def with_silences(
    batches: AsyncIterator[TokenBatch],
    silence_s: float = SILENCE_S,
    on_left: Callable[[], None] = lambda: None,
) -> AsyncGenerator[TokenBatch | None, None]:
    """All batches, and None each time `silence_s` has passed without one.

    Closing this ends the wait for the next batch, which aborts the leg; `on_left` is called before that.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] | None = None

    def wake(_: object = None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    while True:
        step = asyncio.ensure_future(anext(batches))
        step.add_done_callback(wake)
        timer = loop.call_later(silence_s, wake)
        try:
            while not step.done():
                waiter = loop.create_future()
                await waiter
                if not step.done():
                    yield None
                    timer = loop.call_later(silence_s, wake)
            yield step.result()
        except StopAsyncIteration:
            return
        except (asyncio.CancelledError, GeneratorExit):
            on_left()
            raise
        finally:
            timer.cancel()
            if not step.done():
                step.cancel()
                await asyncio.wait({step})
            if not step.cancelled():
                # A reader that leaves when the last step has just ended asks for nothing any more; asyncio would log
                # what it ended with as an error.
                step.exception()
