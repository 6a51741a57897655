"""What the frontend writes into the course of a request: how it begins, its routes and its attempts.

Owns the translation from the hops' own values to the course's; the hops write times themselves. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.observability.request_trace import AttemptCourse, Course
from tandem.observability.trace_context import TraceContext
from tandem_frontend.call_context import Caller
from tandem_frontend.preparation.validation import REQUEST_ID, CheckedRequest
from tandem_frontend.routing.candidates import Route

DOOR = "generate"
"""The operation whose requests are tokenised here; others come with token ids."""


def course_of(request: pb.GenerateRequest, caller: Caller, model: str) -> Course:
    """The course of a request that has just come."""
    return Course(
        request_id=request.request_id if REQUEST_ID.fullmatch(request.request_id) else "",
        call_id=caller.call_id,
        operation=caller.operation,
        model=model,
        tenant=caller.tenant,
        parent=caller.trace,
        clock=caller.time,
        begin_s=caller.time.begin_time_s,
    )


class Record:
    """The course of one request, as its hops write it."""

    def __init__(
        self, course: Course, child: Callable[[TraceContext | None], TraceContext | None] = lambda parent: parent
    ) -> None:
        """`child` makes the span below another one."""
        self.course = course
        self._child = child
        self._step_s = course.begin_s
        self._route_attributes: dict[str, object] = {}

    def arrive(self) -> None:
        """A door that tokenises by itself has done so."""
        if self.course.operation != DOOR:
            self.step("tokenise")

    def step(self, name: str, **attributes: object) -> None:
        """A step has ended that began where the one before it ended."""
        self._step_s = self.course.step(name, self._step_s, **attributes)

    def checked(self, wanted: CheckedRequest) -> None:
        """The request is known."""
        course = self.course
        course.request_id, course.max_tokens = wanted.request_id, wanted.max_tokens
        course.prompt_tokens = len(wanted.token_ids)
        self.step("tokenise" if course.operation == DOOR else "validate")

    @contextlib.contextmanager
    def routing(self) -> Iterator[None]:
        """A route is being chosen."""
        course, begin_s = self.course, self.course.clock()
        try:
            yield
        finally:
            course.step("route", begin_s)
            self._route_attributes = course.steps[-1].attributes

    def begin_attempt(self, number: int, route: Route, tokens_before: int) -> AttemptCourse:
        """Another attempt is about to be sent."""
        course, pick = self.course, route.pick
        self._route_attributes["attempt"] = number
        attempt = AttemptCourse(
            number=number,
            clock=course.clock,
            trace=self._child(course.trace),
            prefill_worker=route.prefill,
            decode_worker=route.decode,
            candidates_count=pick.candidates_count,
            candidates=pick.candidates,
            policy=pick.policy,
            why=pick.why,
            begin_s=course.clock(),
            tokens_before=tokens_before,
        )
        return course.add_attempt(attempt)

    def leaving(self, problem: BaseException | None) -> None:
        """The legs are about to be ended, because of this."""
        if isinstance(problem, (asyncio.CancelledError, GeneratorExit)):
            self.course.left_s = self.course.clock()

    def finish(self, finish: pb.GenerateFinish) -> None:
        """The client gets its finish."""
        usage = finish.usage
        reason = generation_pb2.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
        self.course.finish(reason, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
