"""The supervision hop: owns both legs of an attempt from dispatch to their end.

Legs speak by calls of their sinks, and nothing here waits for a token. The first failure aborts the other leg and ends
the attempt with one error, which names leg, worker, phase, attempt and bootstrap room. A prefill leg can fail the
attempt only until decode has spoken: a first token means that the KV is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.domain.request_state import LegRole, LegState, Phase, RequestState
from tandem.domain.worker import Worker
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
from tandem.observability.request_trace import AttemptTrace
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.link_leg import Logprobs, Sink
from tandem_frontend.execution.step_logprobs import fault_in
from tandem_frontend.routing.candidates import Route

log = logging.getLogger(__name__)

PREFILL_FINISH_TIMEOUT_S = 1.0
"""After decode's end, prefill's account is already on its way; the client does not wait for it longer."""
DECODE_END_TIMEOUT_S = 0.5
"""A prefill engine that was notified of decode's abort may report it before the decode worker does."""

SAID_TO_THE_CLIENT = (InvalidRequest, NotSupported, Overloaded, DeadlinePassed)
"""Failures of a leg that are about the request; all others are about the leg."""
OF_ONE_WORKER = (ServiceError, StaleEpoch)
"""Failures after which another worker may take the leg, but for those below."""
OF_THE_REQUEST = (DeadlinePassed, RequestAborted)
NO_FAULT = (Draining, Overloaded, StaleEpoch)
"""What a worker may say of itself without being broken: it has no room, it goes away, it was started again."""

Send = Callable[[tuple[Sink, Sink | None]], Dispatched]
"""Starts the legs of the attempt; what becomes of them goes to the sinks of the decode and the prefill leg."""


class Hearer(Protocol):
    """Whose attempt it is."""

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens of the attempt, each exactly once and in order."""
        ...

    def is_replaceable(self, worker: Worker) -> bool:
        """Whether another attempt without that worker could take over."""
        ...


class _Side:
    """One leg of the attempt: what it says, in the order in which it says it."""

    def __init__(self, attempt: Attempt, leg: LegState, worker: Worker, *, wants_logprobs: bool = False) -> None:
        self._attempt = attempt
        self.leg = leg
        """The one place that holds its phase."""
        self.role = leg.role
        self.worker = worker
        self._expected_index = 0
        self._token_ids_below = worker.capabilities.vocabulary_size
        self._wants_logprobs = wants_logprobs

    def accepted(self) -> None:
        """See `Sink`."""
        if not self.leg.is_taken:
            self._attempt.on_accepted(self)

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """See `Sink`. On the hot path: once a leg and step."""
        if index != self._expected_index or not token_ids:
            problem = f"{len(token_ids)} tokens came at {index}, not at {self._expected_index}"
            self._attempt.on_failed(self, LegFailed(problem))
            return
        if max(token_ids) >= self._token_ids_below:
            problem = f"token {max(token_ids)} is outside the vocabulary of {self._token_ids_below} tokens"
            self._attempt.on_failed(self, LegFailed(problem))
            return
        if self._wants_logprobs:
            fault = fault_in(logprobs, self._token_ids_below)
            if len(logprobs) != len(token_ids):
                fault = f"{len(logprobs)} log probabilities came with {len(token_ids)} tokens"
            if fault is not None:
                self._attempt.on_failed(self, LegFailed(fault))
                return
        self._expected_index += len(token_ids)
        self._attempt.on_tokens(self, token_ids, logprobs if self._wants_logprobs else ())

    def finish(self, finish: leg_pb2.LegFinish) -> None:
        """See `Sink`."""
        self._attempt.on_finished(self, finish)

    def fail(self, problem: TandemError) -> None:
        """See `Sink`."""
        self._attempt.on_failed(self, problem)

    def unanswered(self) -> None:
        """See `Sink`."""
        self._attempt.on_unanswered(self)


class Attempt:
    """Both legs of one attempt. `start` and `wait` them, and always `end` them."""

    def __init__(
        self,
        route: Route,
        hearer: Hearer,
        state: RequestState | None = None,
        record: AttemptTrace | None = None,
        *,
        wants_logprobs: bool = False,
    ) -> None:
        """Sends nothing yet.

        Args:
            route: who serves it.
            hearer: whose attempt it is.
            state: of the request, when it has one beyond this attempt.
            record: where to write what happens.
            wants_logprobs: whether each token must come with its log probability; others are dropped.
        """
        self.route = route
        self._hearer = hearer
        self._state = state or RequestState()
        self._record = record or AttemptTrace()
        streaming = LegRole.AGGREGATED if route.prefill is None else LegRole.DECODE
        self._state.dispatch(*(() if route.prefill is None else (LegRole.PREFILL,)), streaming)
        legs = self._state.legs
        self._decode = _Side(self, legs[streaming], route.decode, wants_logprobs=wants_logprobs)
        self._prefill = None if route.prefill is None else _Side(self, legs[LegRole.PREFILL], route.prefill)
        loop = asyncio.get_running_loop()
        self._taken: asyncio.Future[None] = loop.create_future()
        """Done when every worker has taken its leg, or the attempt has failed before."""
        self._over: asyncio.Future[None] = loop.create_future()
        """Done when nothing more will come of it."""
        self._dispatched: Dispatched | None = None
        self._prefill_timer: asyncio.TimerHandle | None = None
        self._decode_timer: asyncio.TimerHandle | None = None
        self._failure: TandemError | None = None
        self._is_taken = False
        self._is_ended = False
        self.failed_worker: Worker | None = None
        """Whose leg failed first, in whatever phase, where another worker may do better."""
        self.faulty_worker: Worker | None = None
        """The same one where it failed, and did not merely refuse: what circuit breakers count."""
        self.decode_finish: leg_pb2.LegFinish | None = None
        self.prefill_finish: leg_pb2.LegFinish | None = None

    @property
    def dispatched(self) -> Dispatched:
        """Its legs, as they were sent."""
        assert self._dispatched is not None, "dispatched before start()"
        return self._dispatched

    async def start(self, send: Send) -> None:
        """Send the legs; return when every worker has taken its leg, whatever has become of it since.

        Raises:
            TandemError: one did not.
        """
        try:
            self._dispatched = send((self._decode, self._prefill))
        except ServiceError as problem:
            self.on_failed(self._decode, problem)
        await self._taken
        if self._failure is not None and not self._is_taken:
            raise self._failure

    async def wait(self) -> None:
        """Return when decode has finished and given its account, or `stop` was called.

        Raises:
            TandemError: the first failure of a leg.
        """
        await self._over
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Nothing more is wanted of it."""
        _set(self._over)

    def end(self) -> None:
        """End both legs, in every phase. Harmless when called twice."""
        if self._is_ended:
            return
        self._is_ended = True
        for timer in (self._prefill_timer, self._decode_timer):
            if timer is not None:
                timer.cancel()
        self._abort()
        _set(self._taken)
        _set(self._over)
        self._record.end(self.prefill_finish, self.decode_finish)

    def lose(self, worker: Worker, why: str) -> None:
        """End the attempt: a worker of its is known to be gone, whatever its stream still says."""
        for side in self._sides():
            if side.worker.start == worker.start and side.leg.phase is not Phase.FINISHED:
                self.on_failed(side, LegFailed(why))

    # --- What the legs say

    def on_accepted(self, side: _Side) -> None:
        """Its worker has taken a leg."""
        if self._is_ended:
            return
        self._state.take(side.role)
        self._record.accepted(side.role.value)
        if all(each.leg.is_taken for each in self._sides()):
            self._is_taken = True
            _set(self._taken)

    def on_tokens(self, side: _Side, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """Tokens of a leg. Prefill's is decode's too and is not passed on."""
        if self._is_ended or side.leg.phase.is_last:
            return
        if side is self._prefill:
            side.accepted()
            self._state.speak(side.role)
            return
        if side.leg.phase is not Phase.DECODING:
            # They may overtake the answers that the legs were taken. Whatever breaks after a token has been passed on
            # breaks a stream that has begun: it is continued, never begun again.
            if self._prefill is not None:
                self._prefill.accepted()
            side.accepted()
            self._state.speak(side.role)
        self._hearer.tokens(token_ids, logprobs)

    def on_finished(self, side: _Side, finish: leg_pb2.LegFinish) -> None:
        """A leg has ended by itself, or because somebody else has aborted it."""
        if self._is_ended or side.leg.phase.is_last:
            return
        side.accepted()
        is_aborted = finish.reason == generation_pb2.FINISH_REASON_ABORTED
        if side is self._prefill:
            if is_aborted:
                self._fail(side, RequestAborted(f"the prefill leg was aborted on {side.worker.worker_id}"))
                return
            self.prefill_finish = finish
        else:
            self.decode_finish = finish
        self._state.end_leg(side.role)
        if self.decode_finish is None:
            return
        # Of an aborted request prefill has no account to give: it may still wait for decode.
        if self._prefill is None or self.prefill_finish is not None or is_aborted or self._prefill_is_over():
            _set(self._over)
        elif self._prefill_timer is None:
            loop = asyncio.get_running_loop()
            self._prefill_timer = loop.call_later(PREFILL_FINISH_TIMEOUT_S, _set, self._over)

    def on_failed(self, side: _Side, problem: TandemError) -> None:
        """A leg has failed."""
        if self._is_ended or side.leg.phase is Phase.FINISHED:
            return
        is_consequence = side is self._prefill and problem.metadata.get("cause") == LegFailed.PEER_ABORTED
        if is_consequence and self._decode.leg.phase not in (Phase.FINISHED, Phase.ABORTED):
            # Decode's own end says why, and whether it was a failure at all.
            loop = asyncio.get_running_loop()
            self._decode_timer = loop.call_later(DECODE_END_TIMEOUT_S, self._fail_leg, side, problem)
            return
        self._fail_leg(side, problem)

    def on_unanswered(self, side: _Side) -> None:
        """A leg's worker is slow, and has not answered a question about its health."""
        if self._is_ended or side.leg.phase.is_last:
            return
        if self._hearer.is_replaceable(side.worker):
            self.on_failed(side, LegFailed("no answer, neither to the leg nor to a question about its health"))

    def _fail_leg(self, side: _Side, problem: TandemError) -> None:
        self._fail(side, self._explain(side, problem))

    def _fail(self, side: _Side, problem: TandemError) -> None:
        side.leg.abort()
        if side is self._prefill and self._has_handed_over():
            log.info("prefill leg failed after the hand-over: %s", problem)
            if self.decode_finish is not None:
                _set(self._over)
            return
        self._failure = self._failure or problem
        self._abort()
        _set(self._taken)
        _set(self._over)

    def _sides(self) -> tuple[_Side, ...]:
        return (self._decode,) if self._prefill is None else (self._prefill, self._decode)

    def _has_handed_over(self) -> bool:
        return self._decode.leg.phase in (Phase.DECODING, Phase.FINISHED)

    def _prefill_is_over(self) -> bool:
        return self._prefill is not None and self._prefill.leg.phase.is_last

    def _abort(self) -> None:
        if self._dispatched is not None:
            self._dispatched.decode.abort()
            if self._dispatched.prefill is not None:
                self._dispatched.prefill.abort()

    def _explain(self, side: _Side, problem: TandemError) -> TandemError:
        """What the client is told of a leg's failure."""
        is_blamed = not (side is self._prefill and self._has_handed_over())
        if is_blamed and _is_of_one_worker(problem):
            if self.failed_worker is None and not isinstance(problem, NO_FAULT):
                self.faulty_worker = side.worker
            self.failed_worker = self.failed_worker or side.worker
        if is_blamed:
            self._record.broke(side.role.value, side.worker, side.leg.phase.value, problem.reason)
        if isinstance(problem, SAID_TO_THE_CLIENT):
            return problem
        dispatched = self._dispatched
        facts: dict[str, Any] = {
            "phase": side.leg.phase.value,
            **problem.metadata,
            "leg": side.role.value,
            "worker": side.worker.worker_id,
            "attempt": self._state.attempt if dispatched is None else dispatched.attempt,
            "room": dispatched.room or None if dispatched is not None else None,
        }
        where = f"{side.role.value} leg on {side.worker.worker_id} failed in phase {facts['phase']}"
        return LegFailed(f"{where}: {problem.message}", **facts)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_of_one_worker(problem: TandemError) -> bool:
    """Whether another worker may take the leg. A status without a reason of ours is the worker's own trouble."""
    if isinstance(problem, OF_THE_REQUEST):
        return False
    return isinstance(problem, OF_ONE_WORKER) or type(problem) is TandemError
