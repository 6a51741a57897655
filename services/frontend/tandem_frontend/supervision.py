"""The supervision hop: owns both legs of an attempt from dispatch to their end.

The first failure cancels the other leg and is told once, as an error that names leg, worker, phase, attempt and room.
A prefill leg can fail the attempt only until decode has spoken: a first token means that the KV is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import (
    DeadlinePassed,
    InvalidRequest,
    LegFailed,
    NotSupported,
    Overloaded,
    RequestAborted,
    ServiceError,
    StaleEpoch,
    TandemError,
)
from tandem.model.worker import Worker
from tandem.rpc.leg_calls import LegCall, LegEvent
from tandem_frontend.dispatch import Dispatched

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFILL_FINISH_TIMEOUT_S = 1.0
"""After decode's end, prefill's account is already on its way; the client does not wait for it longer."""

SLOW_ACCEPT_S = 0.5
"""A worker takes a leg at once, before its engine sees it. One that has not by now may be frozen."""

SAID_TO_THE_CLIENT = (InvalidRequest, NotSupported, Overloaded, DeadlinePassed)
"""Failures of a leg that are about the request; all others are about the leg."""
OF_ONE_WORKER = (ServiceError, StaleEpoch)
"""Failures after which another worker may take the leg, but for those below."""
OF_THE_REQUEST = (DeadlinePassed, RequestAborted)


@dataclass(slots=True)
class _Leg:
    name: str
    worker: Worker
    call: LegCall
    phase: str = "dispatch"


class Attempt:
    """Both legs of one attempt. Use as an async context manager: leaving it ends both legs, in every phase."""

    def __init__(
        self,
        dispatched: Dispatched,
        accept_timeout_s: float,
        is_lost: Callable[[Worker], Awaitable[bool]],
        slow_accept_s: float = SLOW_ACCEPT_S,
    ) -> None:
        """Sends nothing: the legs are on their way.

        Args:
            dispatched: the legs.
            accept_timeout_s: a worker that has not taken its leg by then has failed.
            is_lost: asked of a worker that is slow to take its leg: whether to wait no longer.
            slow_accept_s: when it is.
        """
        route = dispatched.route
        self._is_lost = is_lost
        self._slow_accept_s = slow_accept_s
        self.dispatched = dispatched
        self._accept_timeout_s = accept_timeout_s
        self._decode = _Leg("decode" if route.prefill else "aggregated", route.decode, dispatched.decode)
        self._prefill: _Leg | None = None
        if route.prefill is not None and dispatched.prefill is not None:
            self._prefill = _Leg("prefill", route.prefill, dispatched.prefill)
        self._prefill_accepted = asyncio.Event()
        self._prefill_task: asyncio.Task[None] | None = None
        self._failure: TandemError | None = None
        self.refused_by: Worker | None = None
        """Who did not take its leg where another one may; nothing has been generated then."""
        self.decode_finish: leg_pb2.LegFinish | None = None
        self.prefill_finish: leg_pb2.LegFinish | None = None

    async def __aenter__(self) -> Attempt:
        """Return when every worker has taken its leg.

        Raises:
            TandemError: one did not.
        """
        if self._prefill is not None:
            self._prefill_task = asyncio.create_task(self._follow_prefill(self._prefill), name="prefill-leg")
        try:
            await self._watched(self._accepted(self._decode))
            if self._prefill_task is not None:
                await self._prefill_taken(self._prefill_task)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._end()

    async def tokens(self) -> AsyncGenerator[leg_pb2.LegTokens, None]:
        """Tokens as they come from decode; ends when `decode_finish` is known.

        Raises:
            TandemError: the first failure of a leg.
        """
        expected_index = 0
        while self.decode_finish is None:
            event = await self._watched(_next(self._decode))
            kind = event.WhichOneof("event")
            if kind == "tokens":
                self._decode.phase = "decode"
                if event.tokens.index != expected_index:
                    problem = f"tokens came at {event.tokens.index}, not at {expected_index}"
                    raise self._explain(self._decode, LegFailed(problem))
                expected_index += len(event.tokens.token_ids)
                yield event.tokens
            elif kind == "finish":
                self.decode_finish = event.finish
        if self._prefill_task is not None:
            await asyncio.wait({self._prefill_task}, timeout=PREFILL_FINISH_TIMEOUT_S)

    async def _watched(self, decode_work: Coroutine[Any, Any, T]) -> T:
        """Work on decode's stream; raises the failure of whichever leg failed first."""
        try:
            return await decode_work
        except TandemError as problem:
            raise self._failure or self._explain(self._decode, problem) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # The prefill leg's failure ended decode's call; nobody cancelled us.
            if self._failure is not None and task is not None and not task.cancelling():
                raise self._failure from None
            raise

    async def _accepted(self, leg: _Leg) -> None:
        """Wait until a leg's worker has taken it."""
        reading = asyncio.ensure_future(_next(leg))
        try:
            async with asyncio.timeout(self._accept_timeout_s):
                await asyncio.wait({reading}, timeout=self._slow_accept_s)
                if not reading.done() and await self._is_lost(leg.worker) and not reading.done():
                    raise LegFailed("no answer, neither to the leg nor to a question about its health")
                event = await reading
        except TimeoutError:
            raise LegFailed(f"no answer within {self._accept_timeout_s:g} s") from None
        finally:
            reading.cancel()
        if event.WhichOneof("event") != "accepted":
            raise LegFailed("the stream did not begin with accepted")
        leg.phase = "prefill" if self._prefill is None else "bootstrap"

    async def _follow_prefill(self, leg: _Leg) -> None:
        """Read the prefill leg to its end. Its token is decode's too and is not passed on."""
        try:
            await self._accepted(leg)
            self._prefill_accepted.set()
            while self.prefill_finish is None:
                event = await _next(leg)
                kind = event.WhichOneof("event")
                if kind == "tokens":
                    leg.phase = "transfer"
                elif kind == "finish":
                    self.prefill_finish = event.finish
        except TandemError as problem:
            self._fail(self._explain(leg, problem))
            return
        if self.prefill_finish.reason == generation_pb2.FINISH_REASON_ABORTED:
            self._fail(RequestAborted(f"the prefill leg was aborted on {leg.worker.worker_id}"))

    async def _prefill_taken(self, prefill_task: asyncio.Task[None]) -> None:
        taken = asyncio.create_task(self._prefill_accepted.wait())
        try:
            await asyncio.wait({taken, prefill_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            taken.cancel()
        if self._failure is not None:
            raise self._failure

    def _fail(self, problem: TandemError) -> None:
        """A prefill leg has failed: end decode's, unless it no longer needs it."""
        if self._decode.phase == "decode":
            log.info("prefill leg failed after the hand-over: %s", problem)
            return
        self._failure = problem
        self._decode.call.cancel()

    async def _end(self) -> None:
        self._decode.call.cancel()
        if self._prefill is not None and self._prefill_task is not None:
            self._prefill.call.cancel()
            self._prefill_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({self._prefill_task})

    def _explain(self, leg: _Leg, problem: TandemError) -> TandemError:
        """What the client is told of a leg's failure."""
        if leg.phase == "dispatch" and isinstance(problem, OF_ONE_WORKER) and not isinstance(problem, OF_THE_REQUEST):
            self.refused_by = leg.worker
        if isinstance(problem, SAID_TO_THE_CLIENT):
            return problem
        facts: dict[str, Any] = {
            "phase": leg.phase,
            **problem.metadata,
            "leg": leg.name,
            "worker": leg.worker.worker_id,
            "attempt": self.dispatched.attempt,
            "room": self.dispatched.room or None,
        }
        place = f"{leg.name} leg on {leg.worker.worker_id} failed in phase {facts['phase']}"
        return LegFailed(f"{place}: {problem.message}", **facts)


async def _next(leg: _Leg) -> LegEvent:
    """The next event of a leg that has not finished.

    Raises:
        TandemError: it failed.
    """
    event = await leg.call.read()
    if event is None:
        raise LegFailed("the stream ended without a finish")
    return event
