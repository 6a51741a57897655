"""The attempts at one request: how many there are, where each one goes, and the one stream of tokens they make.

Owns the retry policy of requests. An attempt that breaks before its first token is made again elsewhere; one that
breaks later is continued there, from the token after the last that was passed on. What happens inside an attempt is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import logging
import random
from array import array
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.clock import Clock
from tandem.domain.request_state import Phase, RequestState
from tandem.domain.worker import Start, Worker
from tandem.errors import DeadlinePassed, LegFailed, TandemError
from tandem.observability.request_trace import RequestTrace
from tandem.observability.trace_context import headers_of
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.continuation import continued, refusal_reason
from tandem_frontend.execution.dispatch import Dispatch, Dispatched
from tandem_frontend.execution.link_leg import Logprobs, Sink
from tandem_frontend.execution.trace_recorder import Record
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes

log = logging.getLogger(__name__)

ATTEMPTS_MAX = 3
"""In a row without a token."""
BREAKS_MAX = 4
"""Of one stream, over all its attempts: a request that breaks whatever serves it must not go round for ever."""
PAUSE_MAX_S = 0.05
"""Before another attempt. All requests of a dead worker come back at the same moment."""


class Taker(Protocol):
    """Where the tokens of a request go."""

    @property
    def is_over(self) -> bool:
        """The client has everything but the finish: what breaks now is not missed."""
        ...

    @property
    def ends_the_legs(self) -> bool:
        """It wants no more tokens, and the engine does not know that."""
        ...

    def take(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """The next tokens, each once."""
        ...


class ExecutionDeps:
    """Makes attempts at requests."""

    def __init__(
        self,
        routes: Routes,
        refusals: RecentRefusals,
        breakers: CircuitBreakers,
        dispatch: Dispatch,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.routes = routes
        self.refusals = refusals
        self.breakers = breakers
        self.dispatch = dispatch
        self.clock = clock
        self.rng = rng
        self._open: set[RetryingStream] = set()

    def notice(self, workers: Iterable[Worker]) -> None:
        """Take note of a new view: attempts at a start of a worker that has a newer one are at a dead process.

        A worker that has merely left the view may have lost its registry and nothing else: its legs go on speaking, or
        are ended for their silence.
        """
        epochs = {worker.worker_id: worker.epoch for worker in workers}
        for stream in list(self._open):
            for worker in stream.attempt.route.workers:
                if epochs.get(worker.worker_id, 0) > worker.epoch:
                    stream.attempt.lose(worker, f"worker {worker.worker_id} was started again")

    @asynccontextmanager
    async def taken(
        self, leg: leg_pb2.LegRequest, taker: Taker, timeout_s: float | None, record: Record | None = None
    ) -> AsyncIterator[RetryingStream]:
        """The stream of a request whose legs their workers have taken; leaving it ends all legs.

        Args:
            leg: what all legs of the request share.
            taker: where its tokens go; some may come before this returns.
            timeout_s: what is left of the client's deadline; None: no deadline.
            record: where to write what happens.

        Raises:
            TandemError: there is no route, or the failure of the last attempt.
        """
        stream = RetryingStream(self, leg, taker, timeout_s, record or Record(RequestTrace()))
        async with stream:
            self._open.add(stream)
            try:
                yield stream
            finally:
                self._open.discard(stream)


class RetryingStream:
    """The tokens of one request over all its attempts. Entering it makes the first attempt that is taken."""

    def __init__(
        self, attempts: ExecutionDeps, leg: leg_pb2.LegRequest, taker: Taker, timeout_s: float | None, record: Record
    ) -> None:
        self._attempts = attempts
        self._record = record
        self._leg = leg
        self._taker = taker
        self._timeout_s = timeout_s
        self._begin_s = attempts.clock()
        self._max_tokens: int = leg.stopping.max_tokens
        self.state = RequestState()
        self._sent = array("i")
        """Tokens that were passed on, over all attempts."""
        self._break_count = 0
        self._fruitless_count = 0
        """Attempts since the last token."""
        self._tried: set[Start] = set()
        self._failed: set[Start] = set()
        self._attempt: Attempt | None = None
        self._defect: TandemError | None = None
        self._sent_s = 0.0
        """When the present attempt was sent."""
        self._has_answered = False
        """Whether a token has come from it."""
        self._is_stopped = False

    @property
    def attempt(self) -> Attempt:
        """The present attempt."""
        assert self._attempt is not None, "attempt before a worker has taken it"
        return self._attempt

    async def __aenter__(self) -> RetryingStream:
        try:
            with self._record.routing():
                route = self._attempts.routes.first(len(self._leg.token_ids))
            await self._take(route)
        except BaseException as problem:
            self._record.leaving(problem)
            self._end_attempt()
            raise
        return self

    async def __aexit__(self, kind: object, problem: BaseException | None, traceback: object) -> None:
        self._record.leaving(problem)
        if self._has_answered and self.attempt.failed_worker is None and not isinstance(problem, TandemError):
            # Also of a client that has enough, or leaves: its worker did what it was asked for until then.
            self._attempts.breakers.succeeded(self.attempt.route.decode, self._sent_s)
        self._end_attempt()
        if not self.state.phase.is_last:
            self.state.abort()

    async def run(self) -> None:
        """Return when nothing more will come: every token has gone to the taker, each once, from whichever attempt.

        Raises:
            LegFailed: an attempt broke and there is no other one. Metadata `continuation` says why there is none where
                tokens had been passed on: guided, penalties, breaks or workers.
            TandemError: the request itself is at fault, or its deadline has passed.
        """
        while True:
            try:
                if not self._is_stopped:
                    await self.attempt.wait()
            except LegFailed as problem:
                if not (self._is_stopped or self._taker.is_over or self._is_complete()):
                    await self._go_on(problem)
                    continue
            if self._defect is not None:
                raise self._defect
            self.state.finish()
            return

    def stop(self) -> None:
        """The taker has enough, or cannot take more: `run` returns."""
        self._is_stopped = True
        self.attempt.stop()

    def give_up(self, problem: Exception) -> None:
        """The tokens cannot become an answer: `run` raises."""
        if self._defect is None:
            log.error("%s: its tokens could not be turned into an answer", self._leg.request_id, exc_info=problem)
            self._defect = TandemError(f"internal error in an answer: {type(problem).__name__}")
        self.stop()

    def finish(self) -> leg_pb2.LegFinish | None:
        """What the decode leg says at the end; of one that broke after its last token, what is known here."""
        told = self.attempt.decode_finish
        if told is None and self._is_complete():
            return leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
        return told

    # --- What the present attempt says

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """See `supervision.Hearer`. On the hot path: once a request and step."""
        if self._is_stopped:
            return
        if not self._has_answered:
            self._note_answer()
        if len(self._sent) + len(token_ids) > self._max_tokens:
            left = self._max_tokens - len(self._sent)
            log.warning("%s: the worker sent more than the %d tokens asked for", self._leg.request_id, self._max_tokens)
            token_ids, logprobs = token_ids[:left], logprobs[:left]
            self.stop()
            if not token_ids:
                return
        self._sent.extend(token_ids)
        self._fruitless_count = 0
        try:
            self._taker.take(token_ids, logprobs)
        except Exception as problem:
            self.give_up(problem)
            return
        if self._taker.ends_the_legs:
            self.stop()

    def is_replaceable(self, worker: Worker) -> bool:
        """See `supervision.Hearer`."""
        self._record.trace.event("silent worker asked", worker=worker.worker_id, has_answered=False)
        return self._next_route({*self._failed, worker.start}) is not None

    def _is_complete(self) -> bool:
        return len(self._sent) >= self._max_tokens

    async def _go_on(self, problem: LegFailed) -> None:
        """Have another attempt take the rest of a stream that broke."""
        self._break_count += 1
        self._note_failed()
        why_not = refusal_reason(self._leg) if self._sent else None
        if why_not is None and self._break_count > BREAKS_MAX:
            why_not = "breaks"
        if why_not is not None:
            raise self._without_continuation(problem, why_not)
        self._end_attempt()
        route = await self._another()
        if route is None:
            raise self._without_continuation(problem, "workers")
        log.warning(
            "%s: %s; going on after %d tokens with attempt %d",
            self._leg.request_id, problem, len(self._sent), self.state.attempt + 1,
        )  # fmt: skip
        try:
            await self._take(route)
        except DeadlinePassed:
            # Of the request, whichever attempt it passes in.
            raise
        except TandemError as another:
            raise self._without_continuation(problem, "workers") from another

    async def _take(self, route: Route) -> None:
        """Make attempts until one is taken, each on another route."""
        while True:
            try:
                return await self._try(route, self._present_leg())
            except TandemError as problem:
                self._end_attempt()
                if self.attempt.failed_worker is None:
                    # About the request itself: another worker would say the same.
                    raise
                self._note_failed()
                another = await self._another()
                if another is None:
                    raise
                request_id = self._leg.request_id
                log.info("attempt %d at %s: %s; trying another route", self.state.attempt, request_id, problem)
                route = another

    async def _try(self, route: Route, leg: leg_pb2.LegRequest) -> None:
        if self.state.phase is not Phase.QUEUED:
            self.state.requeue()
        self._fruitless_count += 1
        self._tried.update(worker.start for worker in route.workers)
        self._has_answered = False
        self._sent_s = self._attempts.breakers.sent(route.workers)
        number = self.state.attempt + 1
        record = self._record.begin_attempt(number, route, len(self._sent))
        headers = headers_of(record.span_context)
        attempt = self._attempt = Attempt(route, self, self.state, record, wants_logprobs=leg.HasField("logprobs"))

        def send(sinks: tuple[Sink, Sink | None]) -> Dispatched:
            dispatched = self._attempts.dispatch.send(route, leg, number, sinks, self._left_s(), headers)
            record.room = dispatched.room
            return dispatched

        await attempt.start(send)

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.end()

    def _note_answer(self) -> None:
        """The first token: the KV has come, which is all that prefill has to do."""
        self._has_answered = True
        prefill = self.attempt.route.prefill
        if prefill is not None:
            self._attempts.breakers.succeeded(prefill, self._sent_s)

    def _note_failed(self) -> None:
        if self.attempt.faulty_worker is not None:
            self._attempts.breakers.failed(self.attempt.faulty_worker, self._sent_s)
        worker = self.attempt.failed_worker
        if worker is not None:
            self._attempts.refusals.note(worker)
            self._failed.add(worker.start)

    def _next_route(self, failed: Collection[Start]) -> Route | None:
        may_go_on = not self._sent or refusal_reason(self._leg) is None
        if self._fruitless_count >= ATTEMPTS_MAX or not may_go_on:
            return None
        prompt_tokens = len(self._leg.token_ids) + len(self._sent)
        return self._attempts.routes.next(prompt_tokens, self._tried, failed)

    async def _another(self) -> Route | None:
        """The route of another attempt, after a pause that spreads those that broke together."""
        if self._next_route(self._failed) is None:
            return None
        await asyncio.sleep(self._attempts.rng.uniform(0, PAUSE_MAX_S))
        # Chosen after the pause, so that what was learnt in it counts, and no probe is chosen twice.
        with self._record.routing():
            return self._next_route(self._failed)

    def _present_leg(self) -> leg_pb2.LegRequest:
        return continued(self._leg, self._sent) if self._sent else self._leg

    def _left_s(self) -> float | None:
        if self._timeout_s is None:
            return None
        return max(0.0, self._timeout_s - (self._attempts.clock() - self._begin_s))

    def _without_continuation(self, problem: LegFailed, why_not: str) -> LegFailed:
        if self._sent:
            problem.metadata["continuation"] = why_not
        return problem
