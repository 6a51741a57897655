"""The tables of `tandem top` as text: columns, cells, totals and sort order.

Owns the content and sort key of each column; independent of terminals and of gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.observability.fleet_sample import GONE, UNREACHABLE, FrontendSample, Sample, WorkerSample

UNKNOWN = "?"
NOTHING = "-"
KV_PARTS: tuple[Literal["kv_used_tokens", "kv_cached_tokens", "kv_free_tokens"], ...] = (
    "kv_used_tokens",
    "kv_cached_tokens",
    "kv_free_tokens",
)

NAME_WIDTH_MIN = 18
"""Characters of a name column, with the space beside it, below which other columns are left out."""

R = TypeVar("R", WorkerSample, FrontendSample)
Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """One column: its header, its value for a row, and how the value is formatted."""

    head: str
    value: Callable[[R, float], Value]
    """Value for (row, current time in s); also the sort key. None: unknown."""
    text: Callable[[Value], str] = str
    rank: int = 0
    """Where the terminal is narrow, columns of the highest rank go first; those of rank 0 stay."""


def age(value_s: Value) -> str:
    """A duration in s as seconds, minutes, hours or days."""
    assert isinstance(value_s, (int, float))
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if value_s >= 2 * length_s:
            return f"{value_s / length_s:.0f}{unit}"
    return f"{value_s:.0f}s"


def amount(value: Value) -> str:
    """A count with the suffix k, M or G."""
    assert isinstance(value, (int, float))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def percent(value: Value) -> str:
    """A share of 1 in percent."""
    assert isinstance(value, (int, float))
    return f"{100 * value:.0f}"


def milliseconds(value_s: Value) -> str:
    """A duration in s as milliseconds, with one decimal below 100 ms."""
    assert isinstance(value_s, (int, float))
    return f"{value_s * 1e3:.1f}" if value_s < 0.1 else f"{value_s * 1e3:.0f}"


def _load(name: str) -> Callable[[WorkerSample, float], Value]:
    def value(row: WorkerSample, now_s: float) -> Value:
        load = row.load
        return int(getattr(load, name)) if load is not None and load.HasField(name) else None  # type: ignore[arg-type]

    return value


def _kv_percents(row: WorkerSample, now_s: float) -> Value:
    load = row.load
    if load is None or not load.kv_capacity_tokens:
        return None
    known = [getattr(load, name) if load.HasField(name) else None for name in KV_PARTS]
    return "/".join(UNKNOWN if part is None else f"{100 * part / load.kv_capacity_tokens:.0f}" for part in known)


def _count(name: str) -> Callable[[FrontendSample, float], Value]:
    return lambda row, now_s: None if row.stats is None else int(getattr(row.stats, name))


def _latency(of: str, percentile: str) -> Callable[[FrontendSample, float], Value]:
    def value(row: FrontendSample, now_s: float) -> Value:
        if row.stats is None or not row.stats.HasField(of):  # type: ignore[arg-type]
            return None
        latency: admin_pb.LatencyFigures = getattr(row.stats, of)
        return float(getattr(latency, percentile).ToNanoseconds() / 1e9)

    return value


LATENCY_RANKS = {"p50": 2, "p90": 5, "p99": 1}
WORKER_COLUMNS: tuple[Column[WorkerSample], ...] = (
    Column("WORKER", lambda row, now_s: row.name),
    Column("ROLE", lambda row, now_s: row.role, rank=2),
    Column("STATE", lambda row, now_s: row.state),
    Column("HEALTH", lambda row, now_s: row.health, rank=3),
    Column("AGE", lambda row, now_s: max(0.0, now_s - row.epoch / 1_000), age, rank=4),
    Column("RUN", _load("running_requests")),
    Column("WAIT", _load("waiting_requests")),
    Column("QUEUE", _load("waiting_tokens"), amount, rank=5),
    Column("HIT %", lambda row, now_s: row.hit_ratio, percent, rank=5),
    Column("KV U/C/F %", _kv_percents, rank=1),
    Column("TOK/S", lambda row, now_s: row.tokens_per_s, amount, rank=1),
    Column("KV B/S", lambda row, now_s: row.transfer_bytes_per_s, amount, rank=6),
    Column("FAIL", lambda row, now_s: row.failures, rank=1),
)
FRONTEND_COLUMNS: tuple[Column[FrontendSample], ...] = (
    Column("FRONTEND", lambda row, now_s: row.name),
    Column("STATE", lambda row, now_s: row.state),
    Column("AGE", lambda row, now_s: max(0.0, now_s - row.epoch / 1_000), age, rank=3),
    Column("OPEN", _count("open_requests")),
    Column("WAIT", _count("waiting_requests")),
    *(
        Column(f"{head} {p}", _latency(of, p), milliseconds, rank=LATENCY_RANKS[p])
        for head, of in (("TTFT", "time_to_first_token"), ("ITL", "inter_token_latency"))
        for p in ("p50", "p90", "p99")
    ),
    Column("DONE", _count("finished_requests"), amount, rank=2),
    Column("FAIL", _count("failed_requests"), amount, rank=1),
    Column("CONT", _count("continuations"), amount, rank=3),
    Column("REFUSED", _count("refused_requests"), amount, rank=2),
)


def cell(column: Column[R], row: R, now_s: float) -> str:
    """Text of a cell. Latencies are in milliseconds, over the last minute."""
    value = column.value(row, now_s)
    if value is not None:
        return column.text(value)
    return NOTHING if row.state in (GONE, UNREACHABLE) or column.text is milliseconds else UNKNOWN


def fitting(widths: Sequence[int], ranks: Sequence[int], width: int) -> tuple[list[int], int]:
    """Which columns fit into `width`, and how wide the first of them, the name, may be.

    Args:
        widths: of the columns, each as wide as its longest text and the space beside it; the name comes first.
        ranks: of the columns; those of the highest rank are left out first, of equal ones the last.
        width: of the terminal, in characters.

    Returns:
        Indices of the columns that are shown, ascending; and the width of the name, at least `NAME_WIDTH_MIN` or what
        it needs.
    """
    shown = list(range(len(widths)))
    least = min(widths[0], NAME_WIDTH_MIN)
    while least + sum(widths[index] for index in shown[1:]) > width:
        worst = max(shown[1:], key=lambda index: (ranks[index], index), default=None)
        if worst is None or not ranks[worst]:
            break
        shown.remove(worst)
    return shown, max(least, min(widths[0], width - sum(widths[index] for index in shown[1:])))


def shortened(name: str, length: int) -> str:
    """A name of at most so many characters: its ends say which worker it is, its middle rarely does."""
    if len(name) <= length:
        return name
    tail = length // 2
    return name[: length - 1 - tail] + "…" + name[len(name) - tail :]


def ordered(rows: Sequence[R], column: Column[R], now_s: float, *, descending: bool) -> list[R]:
    """The rows sorted by a column; rows without a value come last in either direction."""
    known: list[R] = []
    unknown: list[R] = []
    for row in rows:
        (unknown if column.value(row, now_s) is None else known).append(row)
    known.sort(key=lambda row: column.value(row, now_s), reverse=descending)  # type: ignore[arg-type, return-value]
    known.extend(unknown)
    return known


def totals(sample: Sample) -> str:
    """One line with the totals of the cluster."""
    alive = [worker for worker in sample.workers if worker.state not in (GONE, UNREACHABLE)]
    parts = [
        f"{len(alive)}/{len(sample.workers)} workers",
        f"{sample.total('open_requests')} open",
        f"{sample.total('waiting_requests')} waiting",
        f"{amount(sample.rate('completion_tokens_per_s'))} tokens/s",
        f"{amount(sample.rate('kv_transfer_bytes_per_s'))} B/s of KV",
        f"{amount(sample.total('finished_requests'))} finished",
        f"{sample.total('failed_requests')} failed",
        f"{sample.total('continuations')} continued",
        f"{sample.total('refused_requests')} refused",
        f"{sample.total('cancelled_requests')} cancelled",
    ]
    return " · ".join(parts)
