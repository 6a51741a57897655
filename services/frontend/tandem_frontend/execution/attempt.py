"""One attempt: supervises its legs from dispatch to their end.

The links call the legs' sinks with each event, and nothing here waits for a token. The first failure aborts the other
leg and ends the attempt with one error, which names leg, worker, phase, attempt and bootstrap room. A prefill leg can
fail the attempt only until decode's first token, which proves that the KV has arrived.
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
    KvCorrupt,
    LegFailed,
    ModelNotFound,
    NotSupported,
    Overloaded,
    RequestAborted,
    ServiceError,
    StaleEpoch,
    TandemError,
)
from tandem.observability.request_trace import AttemptTrace
from tandem_frontend.execution.dispatch import Dispatched
from tandem_frontend.execution.embedding_check import fault_in_embedding
from tandem_frontend.execution.link_leg import Logprobs, Sink
from tandem_frontend.execution.step_logprobs import fault_in
from tandem_frontend.routing.candidates import Route

log = logging.getLogger(__name__)

PREFILL_FINISH_TIMEOUT_S = 1.0
"""How long the client's finish waits for prefill's usage and timings after decode has finished. They are usually under
way by then, and are not worth a longer wait."""
DECODE_END_TIMEOUT_S = 0.5
"""A prefill engine that is notified of decode's abort may report it before the decode worker reports the cause."""

REFUSALS = (InvalidRequest, NotSupported)
"""Failures of a leg for which the request itself is at fault: every worker would refuse it."""
CLIENT_ERRORS = (*REFUSALS, Overloaded, DeadlinePassed, ModelNotFound)
"""Failures of a leg that are passed on to the client as they are; all others become LegFailed."""
OF_ONE_WORKER = (ServiceError, StaleEpoch)
"""Failures after which another worker may serve the request, except those below."""
OF_THE_REQUEST = (DeadlinePassed, RequestAborted)
GONE = (Draining, StaleEpoch)
NO_FAULT = (*GONE, Overloaded)
"""Refusals of a healthy worker: it drains, has no capacity, or was restarted. No failure for its circuit breaker."""

Send = Callable[[tuple[Sink, Sink | None]], Dispatched]
"""Starts the legs of the attempt, with the sinks of the decode and the prefill leg."""


class AttemptOwner(Protocol):
    """The request that an attempt belongs to."""

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens of the attempt, each exactly once and in order."""
        ...

    def is_replaceable(self, worker: Worker) -> bool:
        """Whether another attempt without that worker could take over."""
        ...


class _Side:
    """One leg of the attempt: checks its events and passes them on, in the order in which they arrive."""

    def __init__(
        self,
        attempt: Attempt,
        leg: LegState,
        worker: Worker,
        *,
        wants_logprobs: bool = False,
        embedding: leg_pb2.EmbeddingOptions | None = None,
    ) -> None:
        self._attempt = attempt
        self.leg = leg
        """The one place that holds its phase."""
        self.role = leg.role
        self.worker = worker
        self._expected_index = 0
        self._token_ids_below = worker.capabilities.vocabulary_size
        self._wants_logprobs = wants_logprobs
        size = worker.capabilities.embedding_size
        self._embedding_size = None if embedding is None else embedding.dimensions or size
        """Numbers that its finish must have; None: it generates."""

    def accepted(self) -> None:
        """See `Sink`."""
        if not self.leg.is_accepted:
            self._attempt.on_accepted(self)

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """See `Sink`. On the hot path: once a leg and step."""
        if index != self._expected_index or not token_ids:
            problem = f"received {len(token_ids)} tokens at index {index}, expected index {self._expected_index}"
            self._attempt.on_failed(self, LegFailed(problem))
            return
        if max(token_ids) >= self._token_ids_below:
            problem = f"token id {max(token_ids)} is outside the vocabulary of {self._token_ids_below} tokens"
            self._attempt.on_failed(self, LegFailed(problem))
            return
        if self._wants_logprobs:
            fault = fault_in(logprobs, self._token_ids_below)
            if len(logprobs) != len(token_ids):
                fault = f"received {len(logprobs)} log probabilities with {len(token_ids)} tokens"
            if fault is not None:
                self._attempt.on_failed(self, LegFailed(fault))
                return
        self._expected_index += len(token_ids)
        self._attempt.on_tokens(self, token_ids, logprobs if self._wants_logprobs else ())

    def finish(self, finish: leg_pb2.LegFinish) -> None:
        """See `Sink`."""
        is_aborted = finish.reason == generation_pb2.FINISH_REASON_ABORTED
        fault = None if is_aborted else fault_in_embedding(finish.embedding, self._embedding_size or 0)
        if fault is not None:
            self._attempt.on_failed(self, LegFailed(fault))
            return
        self._attempt.on_finished(self, finish)

    def fail(self, problem: TandemError) -> None:
        """See `Sink`."""
        self._attempt.on_failed(self, problem)

    def unresponsive(self) -> None:
        """See `Sink`."""
        self._attempt.on_unresponsive(self)


class Attempt:
    """Both legs of one attempt. Call `start`, then `wait`, and always `end`."""

    def __init__(
        self,
        route: Route,
        owner: AttemptOwner,
        state: RequestState | None = None,
        record: AttemptTrace | None = None,
        *,
        wants_logprobs: bool = False,
        embedding: leg_pb2.EmbeddingOptions | None = None,
        on_prefilled: Callable[[leg_pb2.LegFinish | None], None] = lambda finish: None,
    ) -> None:
        """Sends nothing yet.

        Args:
            route: the workers that serve it.
            owner: gets its tokens.
            state: of the request; None: of this attempt alone.
            record: its part of the request trace.
            wants_logprobs: whether each token must have a log probability; otherwise they are dropped.
            embedding: the embedding that its finish must have; None: none.
            on_prefilled: called when the prompt has been computed, and with prefill's finish when that is known.
        """
        self._on_prefilled = on_prefilled
        self.route = route
        self._owner = owner
        self._state = state or RequestState()
        self._record = record or AttemptTrace()
        streaming = LegRole.AGGREGATED if route.prefill is None else LegRole.DECODE
        self._state.dispatch(*(() if route.prefill is None else (LegRole.PREFILL,)), streaming)
        self.number = self._state.attempt
        """1 for the first attempt of a request."""
        legs = self._state.legs
        self._decode = _Side(self, legs[streaming], route.decode, wants_logprobs=wants_logprobs, embedding=embedding)
        self._prefill = None if route.prefill is None else _Side(self, legs[LegRole.PREFILL], route.prefill)
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = loop.create_future()
        """Done when every worker has accepted its leg, or the attempt has failed before."""
        self._over: asyncio.Future[None] = loop.create_future()
        """Done when no more tokens can arrive."""
        self._dispatched: Dispatched | None = None
        self._prefill_timer: asyncio.TimerHandle | None = None
        self._decode_timer: asyncio.TimerHandle | None = None
        self._failure: TandemError | None = None
        self._was_accepted = False
        self._is_ended = False
        self.failed_worker: Worker | None = None
        """The worker whose leg failed first, where another worker may succeed."""
        self.faulty_worker: Worker | None = None
        """The same worker unless it only refused the leg: its failure counts for the circuit breaker."""
        self.found_corrupt_kv = False
        """Whether the decode worker refused the KV: nothing says which end of the transfer is at fault."""
        self.found_it_gone = False
        """Whether the failed worker said that it leaves or was restarted: the view is behind."""
        self._has_enough = False
        """Whether the response has ended before its decode leg."""
        self.left_early = False
        """Whether the attempt left a worker that was only slow to respond, because another one could take over."""
        self.decode_finish: leg_pb2.LegFinish | None = None
        self.prefill_finish: leg_pb2.LegFinish | None = None

    @property
    def room(self) -> int:
        """SGLang's bootstrap room; 0 on an aggregated route, and while no leg has been sent."""
        return 0 if self._dispatched is None else self._dispatched.room

    @property
    def has_embedding(self) -> bool:
        """Whether the worker has computed an embedding, the only output of such a leg."""
        return self.decode_finish is not None and len(self.decode_finish.embedding) > 0

    @property
    def suspects(self) -> tuple[Worker, ...]:
        """The workers that may be at fault: the failed one, and of corrupt KV both ends of the transfer."""
        if self.found_corrupt_kv:
            return self.route.workers
        return () if self.failed_worker is None else (self.failed_worker,)

    async def start(self, send: Send) -> None:
        """Send the legs; return when every worker has accepted its leg, even if one has failed since.

        Raises:
            TandemError: a worker did not accept its leg.
        """
        try:
            self._dispatched = send((self._decode, self._prefill))
        except ServiceError as problem:
            self.on_failed(self._decode, problem)
        await self._accepted
        if self._failure is not None and not self._was_accepted:
            raise self._failure

    async def wait(self) -> None:
        """Return when decode has finished and the usage of both legs is known, or `stop` was called.

        Raises:
            TandemError: the first failure of a leg.
        """
        await self._over
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make `wait` return: no more tokens are wanted."""
        _set(self._over)

    def no_more_tokens(self) -> None:
        """Abort the decode leg; `wait` returns when prefill's usage is known, or does not come in time."""
        self._has_enough = True
        if self._dispatched is not None:
            self._dispatched.decode.abort()
        if self._prefill is None or self._prefill_is_over():
            self.stop()
        else:
            self._wait_for_prefill()

    def end(self) -> None:
        """Abort both legs, in every phase. May be called twice."""
        if self._is_ended:
            return
        self._is_ended = True
        for timer in (self._prefill_timer, self._decode_timer):
            if timer is not None:
                timer.cancel()
        self._abort()
        _set(self._accepted)
        _set(self._over)
        self._record.end(self.prefill_finish, self.decode_finish)

    def lose(self, worker: Worker, why: str) -> None:
        """Fail the attempt if it uses this worker, whose process is known to have ended."""
        for side in self._sides():
            if side.worker.start == worker.start and side.leg.phase is not Phase.FINISHED:
                self.on_failed(side, LegFailed(why))

    # --- Events of the legs

    def on_accepted(self, side: _Side) -> None:
        """A worker has accepted its leg."""
        if self._is_ended:
            return
        self._state.accept(side.role)
        self._record.accepted(side.role.value)
        if all(each.leg.is_accepted for each in self._sides()):
            self._was_accepted = True
            _set(self._accepted)

    def on_tokens(self, side: _Side, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """Tokens of a leg. Prefill's one token is sent by decode too, and is dropped here."""
        if self._is_ended or side.leg.phase.is_last:
            return
        if side is self._prefill:
            side.accepted()
            self._state.first_token(side.role)
            self._on_prefilled(None)
            return
        if side.leg.phase is not Phase.DECODING:
            # Tokens may overtake the responses that accept the legs. After the first token an attempt counts as
            # accepted: a stream that breaks from here on is continued, never started again.
            if self._prefill is not None:
                self._prefill.accepted()
            side.accepted()
            self._state.first_token(side.role)
            self._on_prefilled(None)
        self._owner.tokens(token_ids, logprobs)

    def on_finished(self, side: _Side, finish: leg_pb2.LegFinish) -> None:
        """A leg has finished, or was aborted by another caller."""
        if self._is_ended or side.leg.phase.is_last:
            return
        side.accepted()
        is_aborted = finish.reason == generation_pb2.FINISH_REASON_ABORTED
        if side is self._prefill:
            if is_aborted:
                self._fail(side, RequestAborted(f"the prefill leg was aborted on {side.worker.worker_id}"))
                return
            self.prefill_finish = finish
            self._on_prefilled(finish)
        else:
            self.decode_finish = finish
            if self._prefill is None:
                self._on_prefilled(finish)
        self._state.end_leg(side.role)
        if self.decode_finish is None and not self._has_enough:
            return
        # The prefill leg of an aborted request may never finish: it may still wait for decode to connect.
        if self._prefill is None or self.prefill_finish is not None or is_aborted or self._prefill_is_over():
            _set(self._over)
        else:
            self._wait_for_prefill()

    def _wait_for_prefill(self) -> None:
        if self._prefill_timer is None:
            loop = asyncio.get_running_loop()
            self._prefill_timer = loop.call_later(PREFILL_FINISH_TIMEOUT_S, _set, self._over)

    def on_failed(self, side: _Side, problem: TandemError) -> None:
        """A leg has failed."""
        if self._is_ended or side.leg.phase is Phase.FINISHED:
            return
        is_consequence = side is self._prefill and problem.metadata.get("cause") == LegFailed.PEER_ABORTED
        if is_consequence and self._decode.leg.phase not in (Phase.FINISHED, Phase.ABORTED):
            # The end of the decode leg has the cause, or is no failure at all: report that one.
            loop = asyncio.get_running_loop()
            self._decode_timer = loop.call_later(DECODE_END_TIMEOUT_S, self._fail_leg, side, problem)
            return
        self._fail_leg(side, problem)

    def on_unresponsive(self, side: _Side) -> None:
        """The worker of a leg is slow, and has not responded to a health check either."""
        if self._is_ended or side.leg.phase.is_last:
            return
        if self._owner.is_replaceable(side.worker):
            self.left_early = True
            self.on_failed(side, LegFailed("worker is unresponsive: no event of the leg and no health check response"))

    def _fail_leg(self, side: _Side, problem: TandemError) -> None:
        self._fail(side, self._explain(side, problem))

    def _fail(self, side: _Side, problem: TandemError) -> None:
        side.leg.abort()
        if side is self._prefill and self._has_handed_over():
            log.info("prefill leg failed after the KV transfer, which does not affect the request: %s", problem)
            if self.decode_finish is not None or self._has_enough:
                _set(self._over)
            return
        self._failure = self._failure or problem
        self._abort()
        _set(self._accepted)
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
        """The error that a leg's failure becomes for the client; records the worker to blame."""
        is_blamed = not (side is self._prefill and self._has_handed_over())
        if is_blamed and _is_of_one_worker(problem):
            if self.failed_worker is None and not isinstance(problem, NO_FAULT):
                self.faulty_worker = side.worker
            if self.failed_worker is None:
                self.found_it_gone = isinstance(problem, GONE)
                self.found_corrupt_kv = isinstance(problem, KvCorrupt)
            self.failed_worker = self.failed_worker or side.worker
        if is_blamed:
            self._record.broke(
                side.role.value, side.worker, side.leg.phase.value, problem.reason,
                is_refusal=isinstance(problem, REFUSALS),
            )  # fmt: skip
        if isinstance(problem, CLIENT_ERRORS):
            return problem
        facts: dict[str, Any] = {
            "phase": side.leg.phase.value,
            **problem.metadata,
            "leg": side.role.value,
            "worker": side.worker.worker_id,
            "attempt": self.number,
            "room": self.room or None,
        }
        if isinstance(problem, KvCorrupt) and self.route.prefill is not None:
            facts["prefill"] = self.route.prefill.worker_id
        where = f"{side.role.value} leg on {side.worker.worker_id} failed in phase {facts['phase']}"
        kind = KvCorrupt if isinstance(problem, KvCorrupt) else LegFailed
        return kind(f"{where}: {problem.message}", **facts)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_of_one_worker(problem: TandemError) -> bool:
    """Whether another worker may serve the request. A status without a Tandem reason is a defect of the worker."""
    if isinstance(problem, OF_THE_REQUEST):
        return False
    return isinstance(problem, OF_ONE_WORKER) or type(problem) is TandemError
