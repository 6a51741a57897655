"""Adds the stats of several processes up to those of one frontend: sums of counts and rates, merged latency histograms.

Pure: messages in, one message out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.frontend.v1 import sibling_service_pb2 as sibling_pb
from tandem.api.types.v1 import error_pb2
from tandem.observability.windows import BUCKETS, Histogram, added
from tandem_frontend.admin.stats import FAILURES_MAX
from tandem_frontend.admin.timeline import latency_figures

COUNTS = (
    "open_requests",
    "waiting_requests",
    "finished_requests",
    "failed_requests",
    "refused_requests",
    "cancelled_requests",
    "continuations",
    "completion_tokens",
    "completion_tokens_per_s",
    "kv_transfer_bytes",
    "kv_transfer_bytes_per_s",
)


def combined(responses: Sequence[sibling_pb.GetSiblingFiguresResponse]) -> pb.WatchFiguresResponse:
    """All responses as one; the first is that of the process that was called."""
    total = pb.WatchFiguresResponse()
    total.CopyFrom(responses[0].figures)
    for response in responses[1:]:
        for name in COUNTS:
            setattr(total, name, getattr(total, name) + getattr(response.figures, name))
    total.counted_since.CopyFrom(
        min((response.figures.counted_since for response in responses), key=lambda since: since.ToNanoseconds())
    )
    if len(responses) > 1:
        del total.leg_failures[:]
        total.leg_failures.extend(_failures(responses))
    total.processes = len(responses)
    first_tokens = [histogram(response.time_to_first_token) for response in responses]
    first_token = latency_figures(added(first_tokens).latencies())
    between = latency_figures(added([histogram(response.inter_token_latency) for response in responses]).latencies())
    if first_token is not None:
        total.time_to_first_token.CopyFrom(first_token)
    if between is not None:
        total.inter_token_latency.CopyFrom(between)
    return total


def buckets(histogram: Histogram) -> sibling_pb.LatencyBuckets:
    """Latencies as a message."""
    present = [bucket for bucket, count in enumerate(histogram.counts) if count]
    return sibling_pb.LatencyBuckets(
        buckets=present, counts=[histogram.counts[bucket] for bucket in present], longest_s=histogram.longest_s
    )


def histogram(message: sibling_pb.LatencyBuckets) -> Histogram:
    """The inverse of `buckets`."""
    counts = [0] * BUCKETS
    for bucket, count in zip(message.buckets, message.counts, strict=True):
        counts[bucket] = count
    return Histogram(tuple(counts), message.longest_s)


def _failures(responses: Sequence[sibling_pb.GetSiblingFiguresResponse]) -> list[pb.LegFailures]:
    """Failures by worker and reason. Limited like those of each process: the rest is counted without a worker."""
    counts: Counter[tuple[str, error_pb2.ErrorReason.ValueType]] = Counter()
    for response in responses:
        for failures in response.figures.leg_failures:
            key = failures.worker_id, failures.reason
            if key not in counts and len(counts) >= FAILURES_MAX:
                key = "", failures.reason
            counts[key] += failures.count
    return [
        pb.LegFailures(worker_id=worker_id, reason=reason, count=count) for (worker_id, reason), count in counts.items()
    ]
