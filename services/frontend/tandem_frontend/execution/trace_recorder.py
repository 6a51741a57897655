"""Writes the request trace: the request's beginning, its steps, routes, attempts and finish.

Owns the translation from the values of the stages to those of `RequestTrace`. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.observability.request_trace import AttemptTrace, RequestTrace
from tandem.observability.trace_context import TraceContext
from tandem_frontend.call_context import Caller
from tandem_frontend.preparation.validation import REQUEST_ID, CheckedRequest, new_request_id
from tandem_frontend.routing.candidates import Route

GENERATE = "generate"
"""The operation whose requests are tokenised here; the OpenAI endpoints pass token ids."""


def trace_of(request: pb.GenerateRequest, caller: Caller, model: str) -> RequestTrace:
    """The trace of a request that has just arrived. One without a usable id gets one: also a refused one is found."""
    return RequestTrace(
        request_id=request.request_id if REQUEST_ID.fullmatch(request.request_id) else new_request_id(),
        call_id=caller.call_id,
        operation=caller.operation,
        model=model,
        tenant=caller.tenant,
        parent=caller.trace,
        edge_begin_s=caller.edge_begin_s,
        clock=caller.time,
        begin_s=caller.time.begin_time_s,
    )


class Record:
    """Records one request; each stage calls it."""

    def __init__(
        self, trace: RequestTrace, child: Callable[[TraceContext | None], TraceContext | None] = lambda parent: parent
    ) -> None:
        """`child` creates the span context of a child span."""
        self.trace = trace
        self._child = child
        self._step_s = trace.begin_s
        self._route_attributes: dict[str, object] = {}

    def arrive(self) -> None:
        """Record the end of tokenisation where the endpoint has done it before the pipeline."""
        if self.trace.operation != GENERATE:
            self.step("tokenise")

    def step(self, name: str, **attributes: object) -> None:
        """Record a step that began at the end of the step before it, and ends now."""
        self._step_s = self.trace.step(name, self._step_s, **attributes)

    def checked(self, wanted: CheckedRequest) -> None:
        """Record a validated request."""
        trace = self.trace
        trace.request_id, trace.max_tokens = wanted.request_id, wanted.max_tokens
        trace.prompt_tokens = len(wanted.token_ids)
        self.step("tokenise" if trace.operation == GENERATE else "validate")

    @contextlib.contextmanager
    def routing(self) -> Iterator[None]:
        """Record the selection of a route."""
        trace, begin_s = self.trace, self.trace.clock()
        try:
            yield
        finally:
            trace.step("route", begin_s)
            self._route_attributes = trace.steps[-1].attributes

    def begin_attempt(self, number: int, route: Route, tokens_before: int) -> AttemptTrace:
        """Record an attempt that is about to be sent."""
        trace, pick = self.trace, route.pick
        self._route_attributes["attempt"] = number
        attempt = AttemptTrace(
            number=number,
            clock=trace.clock,
            span_context=self._child(trace.span_context),
            prefill_worker=route.prefill,
            decode_worker=route.decode,
            candidates_count=pick.candidates_count,
            candidates=pick.candidates,
            policy=pick.policy,
            why=pick.why,
            expected_cached_tokens=route.expected_cached_tokens,
            placement=route.placement,
            begin_s=trace.clock(),
            tokens_before=tokens_before,
        )
        return trace.add_attempt(attempt)

    def leaving(self, problem: BaseException | None) -> None:
        """Record a cancellation by the client, if `problem` is one."""
        if isinstance(problem, (asyncio.CancelledError, GeneratorExit)):
            self.trace.left_s = self.trace.clock()

    def finish(self, finish: pb.GenerateFinish) -> None:
        """Record the finish that is sent to the client."""
        usage = finish.usage
        reason = generation_pb2.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
        self.trace.finish(reason, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
