"""Reads one engine request as a stream of batches, for canaries and tests. Serving uses `port.Output` directly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from tandem.domain.generation import EngineFinish, EngineRequest, TokenBatch, TokenLogprob
from tandem.engine.port import Engine
from tandem.errors import TandemError


class BatchQueue:
    """An `Output` that buffers everything until it is read."""

    def __init__(self) -> None:
        self._batches: asyncio.Queue[TokenBatch | TandemError] = asyncio.Queue()

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """See the port."""
        self._batches.put_nowait(TokenBatch(token_ids=tuple(token_ids), logprobs=tuple(logprobs)))

    def finish(self, finish: EngineFinish) -> None:
        """See the port."""
        self._batches.put_nowait(TokenBatch(finish=finish))

    def fail(self, problem: TandemError) -> None:
        """See the port."""
        self._batches.put_nowait(problem)

    async def read(self) -> TokenBatch:
        """Wait for the next batch; the last one carries the finish.

        Raises:
            TandemError: the request failed.
        """
        batch = await self._batches.get()
        if isinstance(batch, TandemError):
            raise batch
        return batch


async def generate(engine: Engine, request: EngineRequest) -> AsyncGenerator[TokenBatch, None]:
    """Submit a request and yield its batches. Closing the generator early, or cancelling its reader, aborts it.

    Raises:
        TandemError: the engine rejected the request, or it failed.
    """
    output = BatchQueue()
    await engine.submit(request, output)
    try:
        while (batch := await output.read()).finish is None:
            yield batch
        yield batch
    finally:
        engine.abort(request.request_id)
