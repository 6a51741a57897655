"""Runs legs on one worker without a frontend, over a separate step stream.

For tests and benchmarks of a worker; serving uses `tandem_frontend.execution.worker_link`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tandem.api.types.v1 import leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.client.calls import worker_at
from tandem.client.step_calls import StepCall, WorkerCalls
from tandem.domain.worker import Worker
from tandem.errors import TandemError
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_status
from tandem.tls.paths import Tls


class DirectLeg:
    """One leg and what the stream has reported of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.token_ids: list[int] = []
        self.alive_count = 0
        """Number of keepalives: messages that name the leg without a token."""
        self._end: asyncio.Future[leg_pb2.LegFinish] = asyncio.get_running_loop().create_future()

    async def finish(self) -> leg_pb2.LegFinish:
        """Wait for its finish.

        Raises:
            TandemError: the leg failed.
        """
        return await asyncio.shield(self._end)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._end.done()

    def end(self, end: leg_pb2.LegFinish | TandemError) -> None:
        """Record its end; a second end is an AssertionError."""
        if self._end.done():
            raise AssertionError(f"leg {self.number} has ended twice")
        if isinstance(end, TandemError):
            self._end.set_exception(end)
            # Mark it as retrieved: asyncio logs exceptions of legs that a test never awaits.
            self._end.exception()
        else:
            self._end.set_result(end)


class DirectLegs:
    """Legs on one step stream; use `direct_legs`."""

    def __init__(self, calls: WorkerCalls, worker: Worker, steps: StepCall, stream_id: int) -> None:
        self._calls = calls
        self.worker = worker
        self._steps = steps
        self._legs: dict[int, DirectLeg] = {}
        self.stream_id = stream_id

    async def start(self, request: leg_pb2.LegRequest) -> DirectLeg:
        """Start a leg.

        Raises:
            TandemError: the worker rejects it, or cannot be reached.
        """
        leg = DirectLeg(len(self._legs) + 1)
        self._legs[leg.number] = leg
        start = leg2_pb2.LegStart(leg=leg.number, request=request)
        (result,) = await self._calls.start_legs(self.worker, self.stream_id, [start])
        if result.WhichOneof("result") == "refused":
            raise from_status(result.refused)
        return leg

    async def abort(self, leg: DirectLeg) -> None:
        """Abort a leg."""
        await self._calls.abort_legs(self.worker, self.stream_id, [leg.number])

    async def read(self) -> None:
        """Read the stream until it ends, which ends all its legs."""
        try:
            while True:
                message = await self._steps.read()
                counts = message.counts or [1] * len(message.legs)
                token_ids = iter(message.token_ids)
                for number, index, count in zip(message.legs, message.indices, counts, strict=True):
                    leg = self._legs[number]
                    assert index == len(leg.token_ids), f"leg {number}: tokens at {index}, not {len(leg.token_ids)}"
                    leg.token_ids += [next(token_ids) for _ in range(count)]
                for number in message.alive:
                    self._legs[number].alive_count += 1
                for end in message.ends:
                    is_finish = end.WhichOneof("end") == "finish"
                    self._legs[end.leg].end(end.finish if is_finish else from_status(end.failure))
        except TandemError as problem:
            for leg in self._legs.values():
                if not leg.is_over:
                    leg.end(problem)


@asynccontextmanager
async def direct_legs(address: str, tls: Tls | None = None) -> AsyncIterator[DirectLegs]:
    """Open a step stream to the worker at host:port; leaving the context aborts all legs still running on it.

    Raises:
        TandemError: the stream cannot be opened.
    """
    worker, channels = await worker_at(address, tls=tls), Channels(tls)
    calls = WorkerCalls(channels)
    steps = calls.open_steps(worker, "direct")
    try:
        legs = DirectLegs(calls, worker, steps, (await steps.read()).stream_id)
        reading = asyncio.create_task(legs.read(), name="direct-legs")
        try:
            yield legs
        finally:
            reading.cancel()
            await asyncio.wait({reading})
    finally:
        steps.cancel()
        await channels.close()
