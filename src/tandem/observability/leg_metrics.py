"""Metrics of a worker's legs, recorded from the trace of each leg when it closes, with the engine's times and counts.

Nothing is estimated: values that the engine does not report are not recorded.
"""

from __future__ import annotations

from collections import deque

from tandem.domain.generation import EngineFinish, EngineTimings, FinishReason
from tandem.errors import KvCorrupt
from tandem.observability import request_trace as traces
from tandem.observability.metrics import Attributes, Metrics
from tandem.observability.request_trace import LegTrace

HIT_LEGS = 256
"""Number of last finished legs in the hit ratio."""
ABORTED = "aborted"
CORRUPT = "corrupt"


class LegMetrics:
    """A sink of closed leg traces."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._prompts: deque[tuple[int, int]] = deque(maxlen=HIT_LEGS)
        """(prompt tokens, cached tokens) per leg."""

    @property
    def hit_ratio(self) -> float | None:
        """Cached divided by all prompt tokens of the last legs; None before the first."""
        prompt_tokens = sum(prompt for prompt, _ in self._prompts)
        return sum(cached for _, cached in self._prompts) / prompt_tokens if prompt_tokens else None

    def __call__(self, trace: LegTrace) -> None:
        """Record the metrics of a closed leg."""
        assert trace.end_s is not None, "a leg is recorded only after it has closed"
        metrics, finish = self._metrics, trace.engine_finish
        is_aborted = finish is not None and finish.reason is FinishReason.ABORTED
        outcome = ABORTED if is_aborted else trace.outcome
        leg = {"tandem.leg": trace.role}
        metrics.record("tandem.leg.duration", trace.end_s - trace.begin_s, {**leg, "tandem.outcome": outcome})
        if trace.outcome == traces.CANCELLED and trace.left_s is not None:
            metrics.record("tandem.leg.abort.duration", trace.end_s - trace.left_s, leg)
        if trace.reason == KvCorrupt.reason:
            metrics.count("tandem.kv.handovers", 1, {"tandem.kv.check": CORRUPT})
        if finish is not None:
            if finish.kv_check is not None:
                metrics.count("tandem.kv.handovers", 1, {"tandem.kv.check": finish.kv_check.value})
            self._record_tokens(leg, finish)
            if finish.timings is not None:
                self._record_timings(leg, finish.timings)

    def _record_tokens(self, leg: Attributes, finish: EngineFinish) -> None:
        if finish.reason is FinishReason.ABORTED:
            return
        self._metrics.count("tandem.prompt.tokens", finish.prompt_tokens, leg)
        self._metrics.count("tandem.prompt.cached_tokens", finish.cached_tokens, leg)
        self._prompts.append((finish.prompt_tokens, finish.cached_tokens))

    def _record_timings(self, leg: Attributes, timings: EngineTimings) -> None:
        metrics = self._metrics
        queue_s = _between(timings.queued_time_s, timings.prefill_start_time_s)
        prefill_s = _between(timings.prefill_start_time_s, timings.prefill_end_time_s)
        transfer_s = _between(timings.kv_transfer_start_time_s, timings.kv_transfer_end_time_s)
        if queue_s is not None:
            metrics.record("tandem.engine.queue.wait", queue_s, leg)
        if prefill_s is not None:
            metrics.record("tandem.prefill.duration", prefill_s, leg)
        if transfer_s is not None:
            metrics.record("tandem.kv.transfer.duration", transfer_s, leg)
        if timings.kv_transfer_bytes:
            metrics.count("tandem.kv.transfer.bytes", timings.kv_transfer_bytes, leg)
            if transfer_s:
                metrics.record("tandem.kv.transfer.bandwidth", timings.kv_transfer_bytes / transfer_s, leg)


def _between(begin_s: float | None, end_s: float | None) -> float | None:
    return None if begin_s is None or end_s is None else max(0.0, end_s - begin_s)
