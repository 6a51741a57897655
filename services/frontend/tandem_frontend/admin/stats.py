"""Statistics over all requests of this frontend, for `tandem top`: outcomes, recent latencies and rates.

Owns the counting, all of it from request traces. A trace is read when it closes, and once per second while it is open,
so that the hot path does no work for it. Memory is bounded: fixed-size windows, a few numbers per open trace, and a
bounded table of failures.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.observability.request_trace import CANCELLED, FAILED, FINISHED, REFUSED, AttemptTrace, RequestTrace
from tandem.observability.trace_store import TraceStore
from tandem.observability.windows import LatencyWindow, RateWindow

POLL_INTERVAL_S = 1.0
FAILURES_MAX = 256
"""Maximum number of (worker, reason) entries; further failures are counted without a worker."""


@dataclass(slots=True)
class _Seen:
    """How much of an open trace has been counted."""

    gaps: int = 0
    tokens: int = 0
    begun: int = 0
    """Started attempts."""
    ended: int = 0
    """Ended attempts."""
    has_first: bool = False


class RequestStats:
    """The statistics of one process."""

    def __init__(self, traces: TraceStore[RequestTrace], clock: Clock = monotonic) -> None:
        """Registers itself as a sink of `traces`."""
        self._traces = traces
        self._seen: dict[int, _Seen] = {}
        self.since_s = time.time()
        self.outcomes: Counter[str] = Counter()
        """By FINISHED, FAILED, REFUSED, CANCELLED."""
        self.continuations = 0
        self.leg_failures: Counter[tuple[str, str]] = Counter()
        """By worker and reason."""
        self.ttft = LatencyWindow(clock)
        self.itl = LatencyWindow(clock)
        self.tokens = RateWindow(clock)
        self.kv_transfer_bytes = RateWindow(clock)
        traces.sinks.append(self.close)
        traces.part_sinks.append(self.close_part)

    @property
    def open_count(self) -> int:
        """Requests in progress."""
        return len(self._traces.open)

    def close_part(self, trace: RequestTrace) -> None:
        """Count the attempts of a part of a request."""
        self._count(trace)
        self._seen.pop(id(trace), None)

    def close(self, trace: RequestTrace) -> None:
        """Count a closed trace."""
        self.close_part(trace)
        assert trace.outcome in (FINISHED, FAILED, REFUSED, CANCELLED)
        self.outcomes[trace.outcome] += 1

    def look(self) -> None:
        """Count the progress of open traces since the last call."""
        for trace in self._traces.open:
            self._count(trace)

    async def keep_looking(self) -> None:
        """Call `look` every POLL_INTERVAL_S, until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            self.look()

    def _count(self, trace: RequestTrace) -> None:
        seen = self._seen.setdefault(id(trace), _Seen())
        if not seen.has_first and trace.ttft_s is not None:
            seen.has_first = True
            self.ttft.add(trace.ttft_s)
        self.itl.add_all(trace.gaps_s[seen.gaps :])
        seen.gaps = len(trace.gaps_s)
        self.tokens.add(trace.token_count - seen.tokens)
        seen.tokens = trace.token_count
        for attempt in trace.attempts[seen.begun :]:
            self.continuations += attempt.tokens_before > 0
        seen.begun = len(trace.attempts)
        while seen.ended < len(trace.attempts) and trace.attempts[seen.ended].end_s is not None:
            self._count_ended(trace.attempts[seen.ended])
            seen.ended += 1

    def _count_ended(self, attempt: AttemptTrace) -> None:
        self.kv_transfer_bytes.add(attempt.kv_transfer_bytes)
        if attempt.failed_leg and not attempt.is_refusal:
            worker_id = attempt.failed_worker.worker_id if attempt.failed_worker is not None else ""
            key = worker_id, attempt.reason
            if key not in self.leg_failures and len(self.leg_failures) >= FAILURES_MAX:
                key = "", attempt.reason
            self.leg_failures[key] += 1
