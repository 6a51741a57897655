"""The fleet and its requests as JSON values, as the console's page reads them.

Owns the names of the fields. A value that is unknown is null, never zero. Texts are sent as they are: the page shows
them as text.
"""

from __future__ import annotations

from typing import Any

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.domain.worker import Worker
from tandem.observability.fleet_sample import FrontendSample, Sample, WorkerSample
from tandem.observability.timeline_lines import (
    duration_s,
    ending_of,
    lines_of,
    offset_s,
    stats_of,
)
from tandem.rpc.convert import seconds

LOADS = (
    "running_requests",
    "waiting_requests",
    "waiting_tokens",
    "kv_used_tokens",
    "kv_cached_tokens",
    "kv_free_tokens",
    "kv_capacity_tokens",
)
COUNTS = (
    "open_requests",
    "waiting_requests",
    "finished_requests",
    "failed_requests",
    "refused_requests",
    "cancelled_requests",
    "continuations",
)
RATES = ("completion_tokens_per_s", "kv_transfer_bytes_per_s")
LATENCIES = {"ttft": "time_to_first_token", "itl": "inter_token_latency"}
DIGITS = 3
"""Of rates: more would change the row of an idle worker for nothing."""


def worker_row(sample: WorkerSample, worker: Worker) -> dict[str, Any]:
    """One worker."""
    row: dict[str, Any] = {
        "id": sample.name,
        "role": sample.role,
        "state": sample.state,
        "health": sample.health,
        "epoch": sample.epoch,
        "address": sample.address,
        "model": worker.capabilities.model,
        "engine": worker.capabilities.engine,
        "failures": sample.failures,
        "hit_ratio": _rounded(sample.hit_ratio),
        "tokens_per_s": _rounded(sample.tokens_per_s),
        "kv_bytes_per_s": _rounded(sample.transfer_bytes_per_s),
    }
    for name in LOADS:
        known = sample.load is not None and sample.load.HasField(name)  # type: ignore[arg-type]
        row[name] = int(getattr(sample.load, name)) if known else None
    return row


def frontend_row(sample: FrontendSample) -> dict[str, Any]:
    """One frontend; latencies in s, over the last minute."""
    stats = sample.stats
    row: dict[str, Any] = {
        "id": sample.name,
        "state": sample.state,
        "epoch": sample.epoch,
        "address": sample.address,
        "processes": None if stats is None else stats.processes or None,
    }
    for name in COUNTS:
        row[name] = None if stats is None else int(getattr(stats, name))
    for name, field in LATENCIES.items():
        known = stats is not None and stats.HasField(field)  # type: ignore[arg-type]
        latency = getattr(stats, field) if known else None
        for percentile in ("p50", "p90", "p99"):
            row[f"{name}_{percentile}_s"] = None if latency is None else duration_s(getattr(latency, percentile))
    return row


def totals(sample: Sample) -> dict[str, Any]:
    """Sums over all frontends."""
    counts = {name: sample.total(name) for name in COUNTS}
    return counts | {name: round(sample.rate(name), DIGITS) for name in RATES}


def summary_row(frontend: str, summary: pb.RequestSummary) -> dict[str, Any]:
    """A request of a request list; times in s."""
    return {
        "id": summary.request_id,
        "frontend": frontend,
        "operation": summary.operation,
        "outcome": pb.RequestOutcome.Name(summary.outcome).removeprefix("REQUEST_OUTCOME_").lower(),
        "begin_s": seconds(summary.begin_time),
        "took_s": duration_s(summary.duration),
        "attempts": summary.attempts,
        "completion_tokens": summary.completion_tokens,
    }


def timeline_row(frontend: str, timeline: pb.RequestTimeline) -> dict[str, Any]:
    """The timeline of one request; its lines are those of `tandem trace`."""
    lines = list(lines_of(timeline))
    ends_s = [line.begin_s if line.end_s is None else line.end_s for line in lines]
    if timeline.HasField("last_token"):
        ends_s.append(offset_s(timeline.last_token))
    return {
        "id": timeline.request_id,
        "call_id": timeline.call_id,
        "frontend": frontend,
        "operation": timeline.operation,
        "model": timeline.model,
        "tenant": timeline.tenant,
        "ending": ending_of(timeline),
        "is_open": timeline.outcome == pb.REQUEST_OUTCOME_OPEN,
        "begin_s": seconds(timeline.begin.time),
        "first_token_s": offset_s(timeline.first_token) if timeline.HasField("first_token") else None,
        "shown_s": max(ends_s, default=0.0),
        "stats": list(stats_of(timeline)),
        "error": timeline.error_message,
        "trace_id": timeline.trace_id,
        "lines": [
            {
                "begin_s": line.begin_s,
                "end_s": line.end_s,
                "text": line.text,
                "depth": line.depth,
                "is_moment": line.is_moment,
                "part": line.part,
            }
            for line in lines
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
