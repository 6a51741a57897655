"""All attempts of one request, and the one stream of tokens that they produce.

Owns the retry policy of requests. An attempt that fails before its first token is retried on other workers; one that
fails later is continued on other workers, after the last token that was passed on. One that finds no worker, while the
view is known to be behind, waits for the next view (`view_wait`). `attempt` supervises a single one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from array import array
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.clock import Clock
from tandem.domain.request_state import Phase, RequestState
from tandem.domain.worker import Start, Worker
from tandem.errors import DeadlinePassed, LegFailed, NoWorkers, Overloaded, ServiceError, TandemError
from tandem.observability.request_trace import RequestTrace
from tandem.observability.trace_context import headers_of
from tandem.rpc.convert import present
from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.continuation import continued, refusal_reason
from tandem_frontend.execution.dispatch import Dispatch, Dispatched
from tandem_frontend.execution.link_leg import Logprobs, Sink, TokenSink
from tandem_frontend.execution.trace_recorder import Record
from tandem_frontend.execution.view_wait import MissingWorkers, ViewWait
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.policy import RoutingRequest
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_costs import SentRequest

log = logging.getLogger(__name__)

ATTEMPTS_MAX = 3
"""Attempts in a row without a token."""
GONE_MAX = 16
"""Refusals in a row by workers that drain or were restarted, which cost no engine anything and count as no attempt."""
BREAKS_MAX = 4
"""Failures of one accepted stream: a request that crashes every worker must not visit the whole fleet."""
PAUSE_MAX_S = 0.05
"""Random pause before a retry. All requests of a dead worker are retried at the same moment."""


class ExecutionDeps:
    """What all request streams share; opens them."""

    def __init__(
        self,
        routes: Routes,
        refusals: RecentRefusals,
        breakers: CircuitBreakers,
        dispatch: Dispatch,
        clock: Clock,
        rng: random.Random,
        hash_prompt: Callable[[leg_pb2.LegRequest], Any] = lambda leg: None,
        no_worker_wait_s: float = 0.0,
    ) -> None:
        """`hash_prompt` returns what the policy matches with prefix caches; None where it matches nothing.

        `no_worker_wait_s` bounds the wait of requests that find no worker.
        """
        self.routes = routes
        self._hash_prompt = hash_prompt
        self.refusals = refusals
        self.breakers = breakers
        self.dispatch = dispatch
        self.clock = clock
        self.rng = rng
        self.missing = MissingWorkers(clock, no_worker_wait_s)
        self.open: set[RetryingStream] = set()

    def described(self, leg: leg_pb2.LegRequest, about: RoutingRequest) -> RoutingRequest:
        """What the policy sees of a request. Called for the first attempt only: later ones have the same prefix."""
        return replace(about, prompt_tokens=len(leg.token_ids), prompt=self._hash_prompt(leg))

    def notice(self, workers: Iterable[Worker]) -> None:
        """Fail all attempts on workers that have been restarted according to a new view, and wake what waits for it.

        A worker that has only left the view may have lost nothing but its registry: its legs go on, or fail by the
        silence timeout.
        """
        epochs = {worker.worker_id: worker.epoch for worker in workers}
        for stream in list(self.open):
            for worker in stream.attempt.route.workers:
                if epochs.get(worker.worker_id, 0) > worker.epoch:
                    stream.attempt.lose(worker, f"worker {worker.worker_id} was restarted")
        self.missing.follow(has_route=self.routes.has_any())

    @asynccontextmanager
    async def accepted(
        self,
        leg: leg_pb2.LegRequest,
        sink: TokenSink,
        timeout_s: float | None,
        record: Record | None = None,
        prefill: PrefillWork | None = None,
        about: RoutingRequest | None = None,
    ) -> AsyncIterator[RetryingStream]:
        """The stream of a request whose legs have been accepted by their workers; leaving it ends all legs.

        Args:
            leg: what all legs of the request share.
            sink: receives its tokens, possibly before this returns.
            timeout_s: seconds left of the client's deadline; None: no deadline.
            record: writes the request trace.
            prefill: the place of its prompt in the prefill backlog; None: not counted.
            about: its session and tenant, for the routing policy.

        Raises:
            TandemError: there is no route, or the failure of the last attempt.
        """
        prefill = prefill or PrefillBacklog("", math.inf).reserve(len(leg.token_ids))
        about = about or RoutingRequest(0)
        stream = RetryingStream(self, leg, sink, timeout_s, record or Record(RequestTrace()), prefill, about)
        async with stream:
            self.open.add(stream)
            try:
                yield stream
            finally:
                self.open.discard(stream)


class RetryingStream:
    """The tokens of one request over all its attempts. Entering it returns with the first accepted attempt."""

    def __init__(
        self,
        deps: ExecutionDeps,
        leg: leg_pb2.LegRequest,
        sink: TokenSink,
        timeout_s: float | None,
        record: Record,
        prefill: PrefillWork,
        about: RoutingRequest,
    ) -> None:
        self._deps = deps
        self._prefill = prefill
        self._about = about
        self._at_worker: SentRequest | None = None
        """Counts the current attempt in the load of its workers."""
        self._record = record
        self._leg = leg
        self._sink = sink
        self._timeout_s = timeout_s
        self._begin_s = deps.clock()
        self._max_tokens: int = leg.stopping.max_tokens
        self.state = RequestState()
        self._sent = array("i")
        """Tokens passed on to the sink, over all attempts."""
        self._model_digest = about.model_digest
        """Weights that `_sent` comes from, or that `hold_weights` named; only workers with the same may continue."""
        self._break_count = 0
        """Accepted attempts that failed."""
        self._fruitless_count = 0
        """Attempts since the last token."""
        self._gone_count = 0
        """Refusals since the last token by workers that drain or were restarted."""
        self._view_wait = ViewWait(deps.missing)
        self._tried: set[Start] = set()
        self._failed: set[Start] = set()
        self._left_early: set[Start] = set()
        """Those of `_failed` that were only slow to respond: nothing says that the request broke them."""
        self._attempt: Attempt | None = None
        self._defect: TandemError | None = None
        self._sent_s = 0.0
        """When the current attempt was sent."""
        self._has_token = False
        """Whether the current attempt has produced a token."""
        self._is_stopped = False

    @property
    def attempt(self) -> Attempt:
        """The current attempt."""
        assert self._attempt is not None, "attempt before the first one was made"
        return self._attempt

    async def __aenter__(self) -> RetryingStream:
        try:
            self._about = self._deps.described(self._leg, self._about)
            await self._accept(await self._first_route())
        except BaseException as problem:  # a cancellation must abort both legs too
            self._record.leaving(problem)
            self._end_attempt()
            raise
        return self

    async def __aexit__(self, kind: object, problem: BaseException | None, traceback: object) -> None:
        self._record.leaving(problem)
        has_output = self._has_token or self.attempt.has_embedding
        if has_output and self.attempt.failed_worker is None and not isinstance(problem, TandemError):
            # Also when the client had enough or cancelled: until then the worker did its work.
            self._deps.breakers.succeeded(self.attempt.route.decode, self._sent_s)
        self._end_attempt()
        if not self.state.phase.is_last:
            self.state.abort()

    async def run(self) -> None:
        """Return when the sink has every token, each once, over all attempts.

        Raises:
            LegFailed: an attempt failed and cannot be retried. Where tokens had been passed on, metadata
                `continuation` says why: guided, penalties, breaks, weights or workers.
            TandemError: the request itself is at fault, or its deadline has passed.
        """
        while True:
            try:
                await self.attempt.wait()
            except LegFailed as problem:
                if not (self._is_stopped or self._sink.is_over or self._is_complete()):
                    await self._retry(problem)
                    continue
            if self._defect is not None:
                raise self._defect
            self.state.finish()
            return

    def hold_weights(self) -> str:
        """Let only workers with the weights of the current attempt run later ones; returns their digest."""
        self._model_digest = self.attempt.route.decode.capabilities.model_digest
        return self._model_digest

    def stop(self) -> None:
        """Make `run` return: the sink wants no more tokens, or cannot take them."""
        self._is_stopped = True
        self.attempt.stop()

    def give_up(self, problem: Exception) -> None:
        """Make `run` raise: a defect prevents the tokens from becoming a response."""
        if self._defect is None:
            log.error(
                "request %s fails: defect while turning its tokens into a response",
                self._leg.request_id, exc_info=problem,
            )  # fmt: skip
            self._defect = TandemError(f"internal error in a response: {type(problem).__name__}")
        self.stop()

    def finish(self) -> leg_pb2.LegFinish | None:
        """The finish of the decode leg. Of a leg that failed after its last token: derived from the token count."""
        finish = self.attempt.decode_finish
        if finish is None and self._is_complete():
            return leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
        return finish

    # --- Events of the current attempt

    def tokens(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """See `AttemptOwner`. On the hot path: once per request and step."""
        if self._is_stopped:
            return
        if not self._has_token:
            self._note_first_token()
        if len(self._sent) + len(token_ids) > self._max_tokens:
            left = self._max_tokens - len(self._sent)
            log.warning(
                "request %s: worker %s sent more than max_tokens (%d); the rest is dropped",
                self._leg.request_id, self.attempt.route.decode.worker_id, self._max_tokens,
            )  # fmt: skip
            token_ids, logprobs = token_ids[:left], logprobs[:left]
            self.stop()
            if not token_ids:
                return
        self._sent.extend(token_ids)
        self._fruitless_count = 0
        try:
            self._sink.take(token_ids, logprobs)
        except Exception as problem:  # a defect of the sink fails this request alone
            self.give_up(problem)
            return
        if self._sink.ends_the_legs:
            self._is_stopped = True
            self.attempt.no_more_tokens()

    def is_replaceable(self, worker: Worker) -> bool:
        """See `AttemptOwner`."""
        self._record.trace.event("silent worker asked", worker=worker.worker_id, has_answered=False)
        return self._next_route({*self._failed, worker.start}) is not None

    def _is_complete(self) -> bool:
        return len(self._sent) >= self._max_tokens

    async def _retry(self, problem: LegFailed) -> None:
        """Continue a failed stream with another attempt."""
        self._break_count += 1
        self._note_failed()
        why_not = refusal_reason(self._leg) if self._sent else None
        if why_not is None and self._break_count > BREAKS_MAX:
            why_not = "breaks"
        if why_not is not None:
            raise self._without_continuation(problem, why_not)
        self._end_attempt()
        route = await self._another_route(problem)
        if route is None:
            raise self._without_continuation(problem, self._why_no_route())
        log.warning(
            "request %s: %s; continuing after %d tokens with attempt %d",
            self._leg.request_id, problem, len(self._sent), self.state.attempt + 1,
        )  # fmt: skip
        try:
            await self._accept(route)
        except DeadlinePassed:
            # The deadline is the request's own: the client must see that, not the failure before it.
            raise
        except TandemError as another:
            raise self._without_continuation(problem, self._why_no_route()) from another

    async def _first_route(self) -> Route:
        """The route of the first attempt. A request that finds none waits where workers were there a moment ago."""
        while True:
            try:
                with self._record.routing():
                    return self._deps.routes.first(self._about, self._others())
            except NoWorkers as problem:
                if not await self._next_view():
                    raise self._view_wait.explained(problem) from None

    async def _accept(self, route: Route) -> None:
        """Make attempts, each on another route, until one is accepted."""
        while True:
            try:
                return await self._try(route, self._current_leg())
            except TandemError as problem:
                self._end_attempt()
                if self.attempt.failed_worker is None:
                    # The request itself is at fault: every worker would refuse it.
                    raise
                self._note_failed()
                another = await self._another_route(problem)
                if another is None:
                    raise
                log.info(
                    "request %s: attempt %d was not accepted: %s; trying another route",
                    self._leg.request_id, self.state.attempt, problem,
                )  # fmt: skip
                route = another

    async def _try(self, route: Route, leg: leg_pb2.LegRequest) -> None:
        if self.state.phase is not Phase.QUEUED:
            self.state.requeue()
        self._fruitless_count += 1
        self._tried.update(worker.start for worker in route.workers)
        self._has_token = False
        self._sent_s = self._deps.breakers.sent(route.workers)
        number = self.state.attempt + 1
        record = self._record.begin_attempt(number, route, len(self._sent))
        headers = headers_of(record.span_context)
        self._prefill.sent(route.computing.start, route.expected_cached_tokens or 0)
        self._at_worker = self._deps.routes.sent(route, len(leg.token_ids))
        attempt = self._attempt = Attempt(
            route,
            self,
            self.state,
            record,
            wants_logprobs=leg.HasField("logprobs"),
            embedding=present(leg, "embedding", leg.embedding),
            on_prefilled=self._prefill.computed,
        )

        def send(sinks: tuple[Sink, Sink | None]) -> Dispatched:
            dispatched = self._deps.dispatch.send(route, leg, number, sinks, self._left_s(), headers)
            record.room = dispatched.room
            return dispatched

        if self._is_stopped:
            attempt.stop()
        await attempt.start(send)
        self._deps.missing.served()

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.end()
        if self._at_worker is not None:
            self._at_worker.end()
        self._prefill.drop()

    def _note_first_token(self) -> None:
        """Record prefill's success: the first token of decode proves that the KV has arrived."""
        self._has_token = True
        self._gone_count = 0
        self._view_wait.reset()
        if not self._sent:
            self.hold_weights()
        prefill = self.attempt.route.prefill
        if prefill is not None:
            self._deps.breakers.succeeded(prefill, self._sent_s)

    def _note_failed(self) -> None:
        attempt, worker = self.attempt, self.attempt.failed_worker
        for suspect in attempt.suspects:
            if attempt.faulty_worker is not None:
                self._deps.breakers.failed(suspect, self._sent_s)
            self._deps.refusals.note(suspect)
        if worker is not None:
            # Damaged once, a transfer may succeed the next time: where no others are left, the same pair repeats it.
            if not attempt.found_corrupt_kv:
                self._failed.add(worker.start)
            (self._left_early.add if attempt.left_early else self._left_early.discard)(worker.start)
            if self.attempt.found_it_gone and self._gone_count < GONE_MAX:
                self._gone_count += 1
                self._fruitless_count -= 1

    def _next_route(self, failed: Collection[Start]) -> Route | None:
        if not self._may_try():
            return None
        others = self._others()
        route = self._route_without({*failed, *others})
        if route is None and (again := self._slow_before()):
            route = self._route_without({*others, *failed} - again)
        return route

    def _others(self) -> Collection[Start]:
        """Workers that must not continue: tokens of one set of weights are not continued by another."""
        return self._deps.routes.with_other_weights(self._model_digest) if self._model_digest else ()

    def _slow_before(self) -> set[Start]:
        """Workers that were left for being slow and respond again: of use where all others have failed too."""
        current = {worker.start for worker in self.attempt.route.workers}
        return self._left_early - current - set(self._deps.routes.unhealthy())

    def _may_try(self) -> bool:
        """Whether another attempt is allowed, given workers for it."""
        return self._fruitless_count < ATTEMPTS_MAX and (not self._sent or refusal_reason(self._leg) is None)

    def _route_without(self, refused: Collection[Start]) -> Route | None:
        return self._deps.routes.next(self._routing_request(), self._tried, refused)

    def _routing_request(self) -> RoutingRequest:
        prompt_tokens = len(self._leg.token_ids) + len(self._sent)
        return replace(self._about, prompt_tokens=prompt_tokens)

    def _why_no_route(self) -> str:
        """Why a stream is not continued: only workers with other weights could, or no worker is left."""
        is_left = self._fruitless_count < ATTEMPTS_MAX and self._next_route(self._failed) is None
        return "weights" if is_left and self._route_without(self._failed) is not None else "workers"

    async def _another_route(self, problem: TandemError) -> Route | None:
        """The route of another attempt after a failure; None: there is none, also not within the time of a wait.

        A request waits while the view is known to be behind: a worker has said that it leaves or was restarted, or the
        workers of a role have left and were there a moment ago. Where a worker failed without a word, nothing says that
        another one comes, and the client gets the error at once.
        """
        while (route := await self._next_route_after_pause()) is None:
            is_behind = self._gone_count > 0 or not self._deps.missing.has_route
            if not is_behind or not self._may_try() or isinstance(problem, Overloaded):
                break
            if self._why_no_route() == "weights" or not await self._next_view():
                if isinstance(problem, ServiceError):
                    self._view_wait.explained(problem)
                break
        return route

    async def _next_view(self) -> bool:
        """Wait for the next view; returns whether there was one. Raises DeadlinePassed."""
        before_s = self._view_wait.waited_s
        has_come = await self._view_wait.next_view(self._left_s())
        if (waited_s := self._view_wait.waited_s - before_s) > 0:
            self._record.trace.event("waited for a worker", seconds=round(waited_s, 3))
        return has_come

    async def _next_route_after_pause(self) -> Route | None:
        """The route of another attempt, after a pause that spreads the retries of requests that failed together."""
        if self._next_route(self._failed) is None:
            return None
        await asyncio.sleep(self._deps.rng.uniform(0, PAUSE_MAX_S))
        # Selected after the pause, so that failures within it count, and a due probe is not selected twice.
        with self._record.routing():
            return self._next_route(self._failed)

    def _current_leg(self) -> leg_pb2.LegRequest:
        return continued(self._leg, self._sent) if self._sent else self._leg

    def _left_s(self) -> float | None:
        if self._timeout_s is None:
            return None
        return max(0.0, self._timeout_s - (self._deps.clock() - self._begin_s))

    def _without_continuation(self, problem: LegFailed, why_not: str) -> LegFailed:
        if self._sent:
            problem.metadata["continuation"] = why_not
        if why_not == "weights":
            problem.metadata["model_digest"] = self._model_digest
            problem.message += f"; no worker has the weights that this stream began with ({self._model_digest[:12]})"
            problem.args = (problem.message,)
        return problem
