"""A steady load on frontends, in an open loop: so many requests a second, whether or not the ones before have ended.

Owns the requests and their record. A closed loop would ask less while something hangs, and hide it. Prompts are drawn
token by token, so that no two are alike; what comes back is judged in `verdicts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.errors import TandemError
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error
from tandem.testing.eventually import assert_eventually
from tests.faults.support.history import Asked, History, now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is asked, and how often."""

    rate_per_s: float = 20.0
    prompt_tokens: int = 12
    short_tokens: int = 6
    long_tokens: int = 200
    long_every: int = 10
    """One request in so many streams for long, so that there is always one that runs; 0: none does."""
    prompts: Sequence[tuple[int, ...]] = ()
    """Asked in turn; empty: a new one is drawn for each request."""
    token_ids: tuple[int, int] = (6, 1536)
    """Range from which prompts are drawn: ordinary tokens of the demo model."""
    deadline_s: float = 30.0


class SteadyLoad:
    """Asks the frontends in turn from `start` to `stop`."""

    def __init__(self, frontends: Sequence[str], shape: Shape | None = None, seed: int = 0) -> None:
        """`frontends` are host:port."""
        self.history = History()
        self.shape = shape or Shape()
        self._frontends = tuple(frontends)
        self._draw = random.Random(seed)
        self._doors: list[Any] = []
        self._open: set[asyncio.Task[None]] = set()
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to ask."""
        assert self._clock is None, "start() twice"
        self._doors = [self.open_door(address) for address in self._frontends]
        self._clock = asyncio.create_task(self._ask(), name="steady-load")

    async def stop(self) -> History:
        """Ask no more, wait for what is open, and return everything."""
        assert self._clock is not None, "stop() before start()"
        self._clock.cancel()
        await asyncio.wait({self._clock})
        if self._open:
            await asyncio.wait(self._open)
        for door in self._doors:
            await self.close_door(door)
        return self.history

    def open_door(self, address: str) -> Any:
        """What requests to a frontend are made with."""
        return open_channel(address)

    async def close_door(self, door: Any) -> None:
        """Free it."""
        await door.close()

    async def events(self, door: Any, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """One stream.

        Raises:
            TandemError: it ended without a finish.
        """
        stub: Any = InferenceServiceStub(door)
        try:
            async for event in stub.Generate(request, timeout=self.shape.deadline_s):
                yield event
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None

    async def wait_ended(self, count: int, within_s: float = 20.0) -> None:
        """Return when so many requests that begin from now on have ended, well or not."""
        from_s = now_s()
        ended = lambda: sum(asked.end_s is not None for asked in self.history.begun(from_s).asked)  # noqa: E731
        await assert_eventually(ended, lambda found: found >= count, within_s=within_s, what=f"{count} more answers")

    async def wait_running(self, count: int, within_s: float = 20.0) -> None:
        """Return when so many streams run at the same moment."""
        running = lambda: len(self.history.running_at(now_s()))  # noqa: E731
        await assert_eventually(running, lambda found: found >= count, within_s=within_s, what=f"{count} open streams")

    async def _ask(self) -> None:
        begin_s, number = now_s(), 0
        while True:
            # By the clock and not by pauses: a late start does not make the next one late.
            await asyncio.sleep(max(0.0, begin_s + number / self.shape.rate_per_s - now_s()))
            task = asyncio.create_task(self._one(number), name=f"request-{number}")
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            number += 1

    async def _one(self, number: int) -> None:
        shape, place = self.shape, number % len(self._doors)
        is_long = shape.long_every > 0 and number % shape.long_every == 0
        prompt = shape.prompts[number % len(shape.prompts)] if shape.prompts else self._drawn()
        max_tokens = shape.long_tokens if is_long else shape.short_tokens
        asked = Asked(number, self._frontends[place], prompt, max_tokens, now_s())
        self.history.asked.append(asked)
        request = pb.GenerateRequest(
            token_ids={"ids": prompt},  # type: ignore[arg-type]
            sampling={"temperature": 0.0},  # type: ignore[arg-type]
            stopping={"max_tokens": max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
        )
        try:
            async for event in self.events(self._doors[place], request):
                _note(asked, event)
        except TandemError as failure:
            asked.failure = failure
        finally:
            asked.end_s = now_s()

    def _drawn(self) -> tuple[int, ...]:
        return tuple(self._draw.randrange(*self.shape.token_ids) for _ in range(self.shape.prompt_tokens))


def _note(asked: Asked, event: pb.GenerateResponse) -> None:
    kind = event.WhichOneof("event")
    if kind == "accepted":
        route = event.accepted.route
        asked.accepted_s, asked.attempt = now_s(), route.attempt
        asked.workers = tuple(filter(None, (route.prefill_worker_id, route.decode_worker_id)))
    elif kind == "chunk":
        asked.misplaced_count += event.chunk.index != len(asked.token_times_s)
        asked.tokens.extend(event.chunk.token_ids)
        asked.token_times_s.append(now_s())
    elif kind == "finish":
        asked.finish_count += 1
        asked.last_attempt = event.finish.route.attempt


@asynccontextmanager
async def steady_load(
    frontends: Sequence[str], shape: Shape | None = None, kind: type[SteadyLoad] = SteadyLoad
) -> AsyncIterator[SteadyLoad]:
    """A load that runs as long as the block, and whose requests have all ended after it."""
    load = kind(frontends, shape)
    await load.start()
    try:
        yield load
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await load.stop()
