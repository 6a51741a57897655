"""Formats result rows as Markdown, one table per scenario. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.peers.measurements import Measurements
from benchmarks.peers.running import Row
from benchmarks.peers.scenarios import Scenario

Column = tuple[str, Callable[[Row, Measurements], str]]
NONE = "-"


def number(value: float | None, digits: int = 0) -> str:
    """A measurement, or a dash."""
    return NONE if value is None else f"{value:,.{digits}f}"


def cpu(value: float | None) -> str:
    """Milliseconds: small ones with a digit more."""
    return number(value, 1 if value is not None and value < 20 else 0)


def _cores(row: Row, measurements: Measurements) -> str:
    return f"{measurements.workers_cores:.2f} / {measurements.clients_cores:.2f}"


def _others(row: Row, measurements: Measurements) -> str:
    noise = "" if measurements.is_quiet else f" **busy**, best of {row.windows}"
    return f"{measurements.others_cores:.2f}{noise}"


def _ttft(row: Row, measurements: Measurements) -> str:
    return f"{number(measurements.ttft_p50_ms, 1)} / {number(measurements.ttft_p99_ms, 1)}"


def _added(row: Row, measurements: Measurements) -> str:
    return f"{number(measurements.added_ttft_p50_ms, 1)} / {number(measurements.added_ttft_p99_ms, 1)}"


def _memory(row: Row, measurements: Measurements) -> str:
    if row.memory_bytes is None:
        return NONE
    front, proxy = (number(one / 1024) for one in row.memory_bytes)
    return f"{front} + {proxy}" if measurements.proxy_ms_per_1k_tokens is not None else front


SYSTEM: Column = ("system", lambda row, measurements: row.system)
STREAMS: Column = ("C", lambda row, measurements: number(row.streams))
TOKENS: Column = ("tokens/s", lambda row, measurements: number(measurements.tokens_per_s))
REQUESTS: Column = ("requests/s", lambda row, measurements: number(measurements.requests_per_s, 1))
TTFT: Column = ("TTFT p50 / p99 ms", _ttft)
ADDED: Column = ("added TTFT p50 / p99 ms", _added)
GAP: Column = ("gap p99 ms", lambda row, measurements: number(measurements.gap_p99_ms, 1))
TOGETHER: Column = ("tokens an arrival", lambda row, measurements: number(measurements.tokens_per_message, 2))
PER_1K: Column = ("CPU ms per 1k tokens", lambda row, measurements: cpu(measurements.front_ms_per_1k_tokens))
PROXY_PER_1K: Column = ("Envoy", lambda row, measurements: cpu(measurements.proxy_ms_per_1k_tokens))
PER_REQUEST: Column = ("CPU ms a request", lambda row, measurements: number(measurements.front_ms_per_request, 2))
PROXY_PER_REQUEST: Column = ("Envoy", lambda row, measurements: number(measurements.proxy_ms_per_request, 2))
FRONT_CORES: Column = ("front's cores", lambda row, measurements: number(measurements.front_cores, 2))
PROXY_CORES: Column = (
    "Envoy's",
    lambda row, measurements: (
        NONE if measurements.proxy_ms_per_1k_tokens is None else number(measurements.proxy_cores, 2)
    ),
)
FAILED: Column = ("failed", lambda row, measurements: number(measurements.failed))
LOST: Column = ("lost", lambda row, measurements: number(row.lost))
MEMORY: Column = ("KiB a stream", _memory)
WORKERS: Column = ("workers", lambda row, measurements: number(row.workers))
CORES: Column = ("workers' / clients' cores", _cores)
OTHERS: Column = ("others' cores", _others)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "tokens": (SYSTEM, STREAMS, TOKENS, TTFT, ADDED, GAP, PER_1K, PROXY_PER_1K, TOGETHER, FAILED, CORES, OTHERS),
    "requests": (SYSTEM, STREAMS, REQUESTS, TTFT, ADDED, PER_REQUEST, PROXY_PER_REQUEST, FAILED, CORES, OTHERS),
    "open": (SYSTEM, STREAMS, LOST, TOKENS, GAP, MEMORY, FRONT_CORES, PROXY_CORES, PER_1K, CORES, OTHERS),
    "fleet": (SYSTEM, WORKERS, REQUESTS, ADDED, PER_REQUEST, FAILED, CORES, OTHERS),
}


def table(scenario: Scenario, rows: Sequence[Row]) -> str:
    """The rows of one scenario."""
    columns = COLUMNS[scenario.table]
    lines = [" | ".join(title for title, _ in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cells(row, columns)) for row in rows]
    return "\n".join([f"### {scenario.name}: {scenario.title}", "", *(f"| {line} |" for line in lines)])


def _cells(row: Row, columns: Sequence[Column]) -> list[str]:
    if row.measurements is not None:
        return [value(row, row.measurements) for _, value in columns]
    # What is there without measurements, and the reason in the third column.
    first = [row.system, number(row.workers if columns[1] is WORKERS else row.streams), row.problem]
    return [cell.replace("|", "/") for cell in first] + [NONE] * (len(columns) - len(first))
