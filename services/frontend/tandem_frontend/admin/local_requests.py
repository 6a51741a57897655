"""The requests of this process as proto messages: timelines by id, the request list, statistics.

Owns the translation; `servicer.py` merges the responses of all processes of a frontend.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.frontend.v1 import sibling_service_pb2 as sibling_pb
from tandem.observability.request_trace import CANCELLED, FAILED, FINISHED, REFUSED, RequestTrace
from tandem.observability.trace_store import TraceStore
from tandem.observability.windows import LATENCY_WINDOW_S
from tandem.rpc.convert import timestamp
from tandem_frontend.admin.stats import RequestStats
from tandem_frontend.admin.timeline import duration, reason_number, summary_of, timeline_of
from tandem_frontend.processes.sums import buckets

Position = tuple[float, str]
"""Arrival time in s and request id: the sort key of the request list."""


class LocalRequests:
    """The requests of one process."""

    def __init__(self, traces: TraceStore[RequestTrace], stats: RequestStats, waiting_count: Callable[[], int]) -> None:
        """`waiting_count` returns the number of queued requests."""
        self._traces = traces
        self._stats = stats
        self._waiting_count = waiting_count

    def timelines(self, wanted: str) -> list[pb.RequestTimeline]:
        """Timelines of all requests with that request id or x-request-id."""
        return [timeline_of(trace) for trace in self._known() if wanted in (trace.request_id, trace.call_id)]

    def requests(self, count: int, before: Position | None, *, open_only: bool) -> list[sibling_pb.ListedRequest]:
        """At most `count` requests before a position, newest first."""
        known = self._traces.open if open_only else self._known()
        known.sort(key=_position, reverse=True)
        if before is not None:
            known = [trace for trace in known if _position(trace) < before]
        now_s = time.time()
        return [
            sibling_pb.ListedRequest(
                position=sibling_pb.RequestPosition(begin_s=trace.begin_s, request_id=trace.request_id),
                summary=summary_of(trace, now_s),
            )
            for trace in known[:count]
        ]

    def figures(self) -> sibling_pb.GetSiblingFiguresResponse:
        """Current statistics, without percentiles and sequence number."""
        stats = self._stats
        stats.look()
        response = pb.WatchFiguresResponse(
            measured_time=timestamp(time.time()),
            counted_since=timestamp(stats.since_s),
            open_requests=stats.open_count,
            waiting_requests=self._waiting_count(),
            finished_requests=stats.outcomes[FINISHED],
            failed_requests=stats.outcomes[FAILED],
            refused_requests=stats.outcomes[REFUSED],
            cancelled_requests=stats.outcomes[CANCELLED],
            continuations=stats.continuations,
            leg_failures=[
                pb.LegFailures(worker_id=worker_id, reason=reason_number(reason), count=count)
                for (worker_id, reason), count in stats.leg_failures.items()
            ],
            window=duration(LATENCY_WINDOW_S),
            completion_tokens=stats.tokens.total,
            completion_tokens_per_s=stats.tokens.per_s(),
            kv_transfer_bytes=stats.kv_transfer_bytes.total,
            kv_transfer_bytes_per_s=stats.kv_transfer_bytes.per_s(),
        )
        return sibling_pb.GetSiblingFiguresResponse(
            figures=response,
            time_to_first_token=buckets(stats.ttft.histogram()),
            inter_token_latency=buckets(stats.itl.histogram()),
        )

    def _known(self) -> list[RequestTrace]:
        return [*self._traces.closed, *self._traces.open]


def _position(trace: RequestTrace) -> Position:
    return trace.begin_s, trace.request_id
