"""`tandem top` without a screen: plain tables, or one JSON object per line, for scripts and pipes.

Owns the layout; JSON keys are the field names of the protos.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from tandem.cli.top.cells import FRONTEND_COLUMNS, WORKER_COLUMNS, Column, R, cell, totals
from tandem.observability.fleet_sample import FrontendSample, Sample, WorkerSample


def tables(sample: Sample) -> str:
    """Totals, workers and frontends."""
    parts = [totals(sample), _table(WORKER_COLUMNS, sample.workers, sample.time_s)]
    parts.append(_table(FRONTEND_COLUMNS, sample.frontends, sample.time_s))
    if sample.registry_problem is not None:
        parts.append(f"no registry reachable, showing the last known members: {sample.registry_problem}")
    return "\n\n".join(parts)


def line(sample: Sample) -> str:
    """The whole sample as one line of JSON."""
    return json.dumps(
        {
            "time_s": round(sample.time_s, 3),
            "registry_problem": sample.registry_problem,
            "workers": [_worker(row) for row in sample.workers],
            "frontends": [_frontend(row) for row in sample.frontends],
        }
    )


def _table(columns: Sequence[Column[R]], rows: Sequence[R], now_s: float) -> str:
    cells = [tuple(column.head for column in columns)]
    cells += [tuple(cell(column, row, now_s) for column in columns) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(text.rstrip() for text in lines)


def _worker(row: WorkerSample) -> dict[str, Any]:
    return {
        "worker_id": row.name,
        "role": row.role,
        "state": row.state,
        "health": row.health,
        "epoch": row.epoch,
        "address": row.address,
        "tokens_per_s": row.tokens_per_s,
        "cache_hit_ratio": row.hit_ratio,
        "kv_transfer_bytes_per_s": row.transfer_bytes_per_s,
        "leg_failures": row.failures,
        "load": _fields(row.load),
    }


def _frontend(row: FrontendSample) -> dict[str, Any]:
    return {
        "frontend_id": row.name,
        "state": row.state,
        "health": row.health,
        "epoch": row.epoch,
        "address": row.address,
        "figures": _fields(row.stats),
    }


def _fields(message: Any) -> dict[str, Any] | None:
    if message is None:
        return None
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return fields
