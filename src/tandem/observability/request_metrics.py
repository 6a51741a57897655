"""Metrics of the requests of a frontend: what a course's record says when it closes, as the table's figures.

Pure translation, once for each request and never for each token. What happened is the course's business.
"""

from __future__ import annotations

from tandem.observability import request_trace as courses
from tandem.observability.metric_catalog import CANCELLED
from tandem.observability.metrics import Metrics
from tandem.observability.request_trace import AttemptCourse, Course

WAIT_STEP = "wait"


class RequestMetrics:
    """A sink of courses."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """`model` is the one that is served: what clients ask for is theirs to make up."""
        self._metrics = metrics
        self._model = model

    def __call__(self, course: Course) -> None:
        """Tell of one that has closed."""
        self._tell_request(course)
        self._tell_place(course)
        for attempt in course.attempts:
            self._tell_attempt(attempt)

    def _tell_request(self, course: Course) -> None:
        metrics, end_s = self._metrics, course.end_s
        assert end_s is not None, "a course is told when it has closed"
        about = {
            "gen_ai.operation.name": course.operation,
            "gen_ai.provider.name": "tandem",
            "gen_ai.request.model": self._model,
        }
        duration_s = end_s - course.begin_s
        if course.outcome != courses.FINISHED:
            error = CANCELLED if course.outcome == courses.CANCELLED else course.reason
            metrics.record("gen_ai.server.request.duration", duration_s, {**about, "error.type": error})
            return
        metrics.record("gen_ai.server.request.duration", duration_s, about)
        for kind, count in (("input", course.prompt_tokens), ("output", course.completion_tokens)):
            metrics.record("gen_ai.client.token.usage", count, {**about, "gen_ai.token.type": kind})
        if course.first_token_s is None or course.last_token_s is None:
            return
        metrics.record("gen_ai.server.time_to_first_token", course.first_token_s - course.begin_s, about)
        if course.token_count > 1:
            each_s = (course.last_token_s - course.first_token_s) / (course.token_count - 1)
            metrics.record("gen_ai.server.time_per_output_token", each_s, about)

    def _tell_place(self, course: Course) -> None:
        for step in course.steps:
            if step.name == WAIT_STEP:
                self._metrics.count("tandem.requests.admitted")
                self._metrics.record("tandem.queue.wait", step.end_s - step.begin_s)
        if course.left_s is not None and course.end_s is not None and course.outcome == courses.CANCELLED:
            self._metrics.record("tandem.cancel.latency", course.end_s - course.left_s)
        if course.outcome == courses.REFUSED:
            self._metrics.count("tandem.requests.refused", attributes={"tandem.reason": course.reason})

    def _tell_attempt(self, attempt: AttemptCourse) -> None:
        metrics = self._metrics
        route = "aggregated" if attempt.prefill_worker is None else "pair"
        metrics.count("tandem.pairs.chosen", attributes={"tandem.policy": attempt.policy, "tandem.route": route})
        if attempt.tokens_before:
            metrics.count("tandem.continuations", attributes={"tandem.outcome": attempt.outcome})
        if attempt.failed_leg:
            broken = {"tandem.leg": attempt.failed_leg, "tandem.phase": attempt.phase, "tandem.reason": attempt.reason}
            metrics.count("tandem.leg.failures", attributes=broken)
