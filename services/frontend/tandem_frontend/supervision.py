"""The supervision hop: owns both legs of an attempt from dispatch to their end.

The first failure, or a leg's silence beyond its bound, cancels the other leg and is told once, as an error that names
leg, worker, phase, attempt and room. A prefill leg can fail the attempt only until decode has spoken: a first token
means that the KV is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import (
    DeadlinePassed,
    Draining,
    InvalidRequest,
    LegFailed,
    NotSupported,
    Overloaded,
    RequestAborted,
    ServiceError,
    StaleEpoch,
    TandemError,
)
from tandem.model.request_state import LegRole, Phase, RequestState
from tandem.model.worker import Worker
from tandem.observe.course import AttemptCourse
from tandem.rpc.leg_calls import LegCall, LegEvent
from tandem.rpc.messages import PHASE_BY_NUMBER
from tandem_frontend.dispatch import Dispatched

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFILL_FINISH_TIMEOUT_S = 1.0
"""After decode's end, prefill's account is already on its way; the client does not wait for it longer."""

SAID_TO_THE_CLIENT = (InvalidRequest, NotSupported, Overloaded, DeadlinePassed)
"""Failures of a leg that are about the request; all others are about the leg."""
OF_ONE_WORKER = (ServiceError, StaleEpoch)
"""Failures after which another worker may take the leg, but for those below."""
OF_THE_REQUEST = (DeadlinePassed, RequestAborted)
NO_FAULT = (Draining, Overloaded, StaleEpoch)
"""What a worker may say of itself without being broken: it has no room, it goes away, it was started again."""
LOOK_S = 0.25
"""Between looks at the clock: a timer for each event would cost more than the event."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a leg may say nothing."""

    accept_s: float
    """Until its worker has taken it."""
    silence_s: float
    """Between two events from there on. Workers tell of progress several times within it."""
    slow_s: float = 0.8
    """After so much of either the worker is asked whether it lives. A healthy one takes a leg at once, before its
    engine sees it, and tells of progress twice in this time."""


@dataclass(slots=True)
class _Leg:
    role: LegRole
    worker: Worker
    call: LegCall
    heard_s: float
    phase: Phase = Phase.DISPATCHED
    is_asked: bool = False
    """Whether its worker has been asked about this silence."""
    is_read: bool = False
    """Whether somebody waits for its next event now: a leg that nobody reads is not silent."""


class Attempt:
    """Both legs of one attempt. Use as an async context manager: leaving it ends both legs, in every phase."""

    def __init__(
        self,
        dispatched: Dispatched,
        bounds: Bounds,
        is_lost: Callable[[Worker], Awaitable[bool]],
        state: RequestState | None = None,
        course: AttemptCourse | None = None,
    ) -> None:
        """Sends nothing: the legs are on their way.

        Args:
            dispatched: the legs.
            bounds: how long they may be silent.
            is_lost: asked of a worker whose leg is slow to speak: whether to wait no longer.
            state: of the request, when it has one beyond this attempt.
            course: where to write what happens.
        """
        route = dispatched.route
        self._is_lost = is_lost
        self._asking: set[asyncio.Task[None]] = set()
        self.dispatched = dispatched
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._state = state or RequestState()
        self._course = course or AttemptCourse()
        now_s = self._loop.time()
        streaming = LegRole.DECODE if route.prefill else LegRole.AGGREGATED
        self._decode = _Leg(streaming, route.decode, dispatched.decode, now_s)
        self._prefill: _Leg | None = None
        if route.prefill is not None and dispatched.prefill is not None:
            self._prefill = _Leg(LegRole.PREFILL, route.prefill, dispatched.prefill, now_s)
        self._state.dispatch(*(leg.role for leg in self._legs()))
        self._watchdog: asyncio.TimerHandle | None = None
        self._prefill_accepted = asyncio.Event()
        self._prefill_task: asyncio.Task[None] | None = None
        self._failure: TandemError | None = None
        self.failed_worker: Worker | None = None
        """Whose leg failed first, in whatever phase, where another worker may do better."""
        self.faulty_worker: Worker | None = None
        """The same one where it failed, and did not merely refuse: what breakers count."""
        self.decode_finish: leg_pb2.LegFinish | None = None
        self.prefill_finish: leg_pb2.LegFinish | None = None

    async def __aenter__(self) -> Attempt:
        """Return when every worker has taken its leg.

        Raises:
            TandemError: one did not.
        """
        if self._prefill is not None:
            self._prefill_task = asyncio.create_task(self._follow_prefill(self._prefill), name="prefill-leg")
        self._look_later()
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
            event = await self._watched(self._next(self._decode))
            kind = event.WhichOneof("event")
            if kind == "tokens":
                if event.tokens.index != expected_index or not event.tokens.token_ids:
                    problem = (
                        f"{len(event.tokens.token_ids)} tokens came at {event.tokens.index}, not at {expected_index}"
                    )
                    raise self._explain(self._decode, LegFailed(problem))
                expected_index += len(event.tokens.token_ids)
                self._decode.phase = Phase.DECODING
                self._state.tokens(self._decode.role, len(event.tokens.token_ids))
                yield event.tokens
            elif kind == "finish":
                self.decode_finish = event.finish
                self._state.end_leg(self._decode.role)
            elif kind == "progress":
                self._note_progress(self._decode, event.progress)
        # Of an aborted request prefill has no account to give: it may still wait for decode.
        if self._prefill_task is not None and self.decode_finish.reason != generation_pb2.FINISH_REASON_ABORTED:
            await asyncio.wait({self._prefill_task}, timeout=PREFILL_FINISH_TIMEOUT_S)

    def lose(self, worker: Worker, why: str) -> None:
        """End the attempt: a worker of its is known to be gone, whatever its stream still says."""
        for leg in self._legs():
            if leg.worker.start == worker.start and leg.phase is not Phase.FINISHED:
                self._fail(leg, self._explain(leg, LegFailed(why)))

    async def _watched(self, decode_work: Coroutine[Any, Any, T]) -> T:
        """Work on decode's stream; raises the failure of whichever leg failed first."""
        try:
            return await decode_work
        except TandemError as problem:
            raise self._failure or self._explain(self._decode, problem) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # A failure seen elsewhere ended decode's call; nobody cancelled us.
            if self._failure is not None and task is not None and not task.cancelling():
                raise self._failure from None
            raise

    async def _accepted(self, leg: _Leg) -> None:
        """Wait until a leg's worker has taken it."""
        event = await self._next(leg)
        if event.WhichOneof("event") != "accepted":
            raise LegFailed("the stream did not begin with accepted")
        self._state.take(leg.role)
        self._course.accepted(leg.role.value)
        leg.phase = Phase.PREFILLING if leg.role is LegRole.AGGREGATED else Phase.BOOTSTRAPPING

    async def _follow_prefill(self, leg: _Leg) -> None:
        """Read the prefill leg to its end. Its token is decode's too and is not passed on."""
        try:
            await self._accepted(leg)
            self._prefill_accepted.set()
            while self.prefill_finish is None:
                event = await self._next(leg)
                kind = event.WhichOneof("event")
                if kind == "tokens":
                    leg.phase = Phase.TRANSFERRING
                    if leg.role in self._state.legs:
                        self._state.tokens(leg.role, 1)
                elif kind == "finish":
                    self.prefill_finish = event.finish
                elif kind == "progress":
                    self._note_progress(leg, event.progress)
        except TandemError as problem:
            self._fail(leg, self._explain(leg, problem))
            return
        if self.prefill_finish.reason == generation_pb2.FINISH_REASON_ABORTED:
            self._fail(leg, RequestAborted(f"the prefill leg was aborted on {leg.worker.worker_id}"))
            return
        leg.phase = Phase.FINISHED
        if leg.role in self._state.legs:
            self._state.end_leg(leg.role)

    async def _prefill_taken(self, prefill_task: asyncio.Task[None]) -> None:
        taken = asyncio.create_task(self._prefill_accepted.wait())
        try:
            await asyncio.wait({taken, prefill_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            taken.cancel()
        if self._failure is not None:
            raise self._failure

    def _fail(self, leg: _Leg, problem: TandemError) -> None:
        """A leg has failed elsewhere than in the hands of decode's reader: end decode's call, if it needs that leg."""
        leg.call.cancel()
        if leg.role is LegRole.PREFILL and self._decode.phase is Phase.DECODING:
            log.info("prefill leg failed after the hand-over: %s", problem)
            return
        self._failure = self._failure or problem
        self._decode.call.cancel()

    async def _end(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        for asking in self._asking:
            asking.cancel()
        self._decode.call.cancel()
        if self._prefill is not None and self._prefill_task is not None:
            self._prefill.call.cancel()
            self._prefill_task.cancel()
        try:
            if self._prefill_task is not None:
                await asyncio.wait({self._prefill_task})
        finally:
            self._course.end(self.prefill_finish, self.decode_finish)

    def _legs(self) -> tuple[_Leg, ...]:
        return (self._decode,) if self._prefill is None else (self._prefill, self._decode)

    async def _next(self, leg: _Leg) -> LegEvent:
        """The next event of a leg that has not finished.

        Raises:
            TandemError: it failed.
        """
        leg.heard_s, leg.is_read, leg.is_asked = self._loop.time(), True, False
        event = await leg.call.read()
        leg.is_read = False
        if event is None:
            raise LegFailed("the stream ended without a finish")
        return event

    def _note_progress(self, leg: _Leg, progress: leg_pb2.LegProgress) -> None:
        """What a leg tells of itself beyond being alive."""
        phase = PHASE_BY_NUMBER.get(progress.phase)
        # A prefill leg may still speak while the request that has ended is being cleared away.
        if phase is not None and leg.role in self._state.legs:
            self._state.progress(leg.role, phase)
            leg.phase = self._state.legs[leg.role].phase

    def _look_later(self) -> None:
        bounds = self._bounds
        delay_s = min(LOOK_S, bounds.slow_s / 2, bounds.accept_s / 2, bounds.silence_s / 2)
        self._watchdog = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        """End the attempt when a leg has been silent for too long, and ask its worker before that."""
        now_s = self._loop.time()
        for leg in self._legs():
            is_taken = leg.phase is not Phase.DISPATCHED
            bound_s = self._bounds.silence_s if is_taken else self._bounds.accept_s
            silent_s = now_s - leg.heard_s if leg.is_read else 0.0
            if silent_s >= bound_s:
                what = "nothing heard for" if is_taken else "no answer within"
                self._fail(leg, self._explain(leg, LegFailed(f"{what} {bound_s:g} s")))
            elif silent_s >= self._bounds.slow_s and not leg.is_asked:
                leg.is_asked = True
                asking = asyncio.create_task(self._ask(leg, leg.heard_s), name="slow-leg")
                self._asking.add(asking)
                asking.add_done_callback(self._asking.discard)
        self._look_later()

    async def _ask(self, leg: _Leg, heard_s: float) -> None:
        """Give a leg up whose worker answers nobody, unless it has spoken meanwhile."""
        if await self._is_lost(leg.worker) and leg.is_read and leg.heard_s == heard_s:
            problem = LegFailed("no answer, neither to the leg nor to a question about its health")
            self._fail(leg, self._explain(leg, problem))

    def _explain(self, leg: _Leg, problem: TandemError) -> TandemError:
        """What the client is told of a leg's failure."""
        is_blamed = not (leg.role is LegRole.PREFILL and self._decode.phase is Phase.DECODING)
        if is_blamed and _is_of_one_worker(problem):
            if self.failed_worker is None and not isinstance(problem, NO_FAULT):
                self.faulty_worker = leg.worker
            self.failed_worker = self.failed_worker or leg.worker
        if is_blamed:
            self._course.broke(leg.role.value, leg.worker, leg.phase.value, problem.reason)
        if isinstance(problem, SAID_TO_THE_CLIENT):
            return problem
        facts: dict[str, Any] = {
            "phase": leg.phase.value,
            **problem.metadata,
            "leg": leg.role.value,
            "worker": leg.worker.worker_id,
            "attempt": self.dispatched.attempt,
            "room": self.dispatched.room or None,
        }
        place = f"{leg.role.value} leg on {leg.worker.worker_id} failed in phase {facts['phase']}"
        return LegFailed(f"{place}: {problem.message}", **facts)


def _is_of_one_worker(problem: TandemError) -> bool:
    """Whether another worker may take the leg. A status without a reason of ours is the worker's own trouble."""
    if isinstance(problem, OF_THE_REQUEST):
        return False
    return isinstance(problem, OF_ONE_WORKER) or type(problem) is TandemError
