"""Metrics of a frontend's requests, recorded from the trace of each request when it closes.

Pure translation, once per request and never per token.
"""

from __future__ import annotations

from tandem.observability import request_trace as traces
from tandem.observability.metric_attributes import CANCELLED
from tandem.observability.metrics import Metrics
from tandem.observability.request_trace import AttemptTrace, RequestTrace

WAIT_STEP, ROUTE_STEP = "wait", "route"
EMBEDDINGS = "embeddings"
"""The operation that puts out no tokens."""


class RequestMetrics:
    """A sink of closed request traces."""

    def __init__(self, metrics: Metrics) -> None:
        """Records into `metrics`. The model is that of the trace: the name in a request may be anything."""
        self._metrics = metrics

    def __call__(self, trace: RequestTrace) -> None:
        """Record the metrics of a closed request."""
        self._record_request(trace)
        self._record_admission(trace)
        self.part(trace)

    def part(self, trace: RequestTrace) -> None:
        """Record the attempts of a part of a request."""
        for attempt in trace.attempts:
            self._record_attempt(attempt)

    def _record_request(self, trace: RequestTrace) -> None:
        metrics, end_s = self._metrics, trace.end_s
        assert end_s is not None, "a request is recorded only after it has closed"
        about = {
            "gen_ai.operation.name": trace.operation,
            "gen_ai.provider.name": "tandem",
            "gen_ai.request.model": trace.model,
        }
        duration_s = end_s - trace.begin_s
        if trace.outcome != traces.FINISHED:
            error = CANCELLED if trace.outcome == traces.CANCELLED else trace.reason
            metrics.record("gen_ai.server.request.duration", duration_s, {**about, "error.type": error})
            return
        metrics.record("gen_ai.server.request.duration", duration_s, about)
        for kind, count in (("input", trace.prompt_tokens), ("output", trace.completion_tokens)):
            if kind == "output" and trace.operation == EMBEDDINGS:
                continue
            metrics.record("gen_ai.client.token.usage", count, {**about, "gen_ai.token.type": kind})
        if trace.first_token_s is None or trace.last_token_s is None:
            return
        metrics.record("gen_ai.server.time_to_first_token", trace.first_token_s - trace.begin_s, about)
        if trace.token_count > 1:
            each_s = (trace.last_token_s - trace.first_token_s) / (trace.token_count - 1)
            metrics.record("gen_ai.server.time_per_output_token", each_s, about)

    def _record_admission(self, trace: RequestTrace) -> None:
        for step in trace.steps:
            if step.name == WAIT_STEP:
                self._metrics.count("tandem.requests.admitted")
                self._metrics.record(
                    "tandem.queue.wait", step.end_s - step.begin_s, {"gen_ai.request.model": trace.model}
                )
            elif step.name == ROUTE_STEP:
                self._metrics.record("tandem.route.duration", step.end_s - step.begin_s)
        if trace.left_s is not None and trace.end_s is not None and trace.outcome == traces.CANCELLED:
            self._metrics.record("tandem.cancel.latency", trace.end_s - trace.left_s)
        if trace.outcome == traces.REFUSED:
            self._metrics.count("tandem.requests.refused", attributes={"tandem.reason": trace.reason})

    def _record_attempt(self, attempt: AttemptTrace) -> None:
        metrics = self._metrics
        route = "aggregated" if attempt.prefill_worker is None else "pair"
        metrics.count("tandem.pairs.chosen", attributes={"tandem.policy": attempt.policy, "tandem.route": route})
        if attempt.placement is not None:
            metrics.count("tandem.placements", attributes={"tandem.placement": attempt.placement.value})
        self._record_choices(attempt)
        if attempt.tokens_before:
            metrics.count("tandem.continuations", attributes={"tandem.outcome": attempt.outcome})
        if attempt.failed_leg and not attempt.is_refusal:
            failure = {"tandem.leg": attempt.failed_leg, "tandem.phase": attempt.phase, "tandem.reason": attempt.reason}
            metrics.count("tandem.leg.failures", attributes=failure)

    def _record_choices(self, attempt: AttemptTrace) -> None:
        metrics, policy = self._metrics, {"tandem.policy": attempt.policy}
        for worker in (attempt.prefill_worker, attempt.decode_worker):
            if worker is not None:
                metrics.count("tandem.route.choices", attributes={**policy, "tandem.role": worker.role.value})
        cached_tokens, expected_tokens = attempt.cached_tokens, attempt.expected_cached_tokens
        if cached_tokens is not None:
            metrics.count("tandem.route.cached_tokens", cached_tokens, policy)
            if expected_tokens is not None:
                metrics.count("tandem.route.expected_cached_tokens", expected_tokens, policy)
