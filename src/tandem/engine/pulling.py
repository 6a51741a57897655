"""One request of an engine read batch by batch, for canaries and tests: serving pushes, see `port.Output`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from tandem.domain.generation import EngineFinish, EngineRequest, TokenBatch, TokenLogprob
from tandem.engine.port import Engine
from tandem.errors import TandemError


class BatchQueue:
    """An `Output` that keeps everything until it is read."""

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
        """The next batch; the last one carries the finish.

        Raises:
            TandemError: the request failed.
        """
        batch = await self._batches.get()
        if isinstance(batch, TandemError):
            raise batch
        return batch


async def generate(engine: Engine, request: EngineRequest) -> AsyncGenerator[TokenBatch, None]:
    """All batches of a request. Closing this early, or cancelling its reader, aborts the request.

    Raises:
        TandemError: the engine refused the request, or it failed.
    """
    output = BatchQueue()
    await engine.submit(request, output)
    try:
        while (batch := await output.read()).finish is None:
            yield batch
        yield batch
    finally:
        engine.abort(request.request_id)
