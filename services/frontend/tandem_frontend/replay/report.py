"""What a replay prints: a column for each policy, and the workers of each; the JSON file.

Owns the layout; `summary` has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tandem.domain.placement import Placement
from tandem.domain.worker import WorkerRole
from tandem.errors import ConfigError
from tandem_frontend.replay.summary import Summary


def print_summaries(console: Console, summaries: Sequence[Summary]) -> None:
    """Print the table of the policies, and that of each policy's workers."""
    console.print(_policies(summaries))
    for summary in summaries:
        console.print(_workers(summary))
        if summary.outcomes:
            ended = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.outcomes.items()))
            console.print(f"{summary.policy}: {ended}: not in the figures above", highlight=False)


def write_json(file: Path, settings: dict[str, Any], summaries: Sequence[Summary]) -> None:
    """Write the settings of a replay and all its figures.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {"settings": settings, "policies": [summary.as_json() for summary in summaries]}
    try:
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as problem:
        raise ConfigError("json", f"{file} cannot be written: {problem.strerror}") from None


def _policies(summaries: Sequence[Summary]) -> Table:
    """A column for each policy."""
    table = Table("", title="policies", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for summary in summaries:
        table.add_column(summary.policy, justify="right", min_width=len(summary.policy))
    for name, figure in FIGURES:
        table.add_row(name, *(figure(summary) for summary in summaries))
    return table


def _workers(summary: Summary) -> Table:
    title = f"workers under {summary.policy}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("worker", no_wrap=True)
    for heading in ("busy", "requests", "prompt tok", "hits", "answer tok", "waiting", "running"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in summary.workers:
        is_decode = one.role == WorkerRole.DECODE.value
        table.add_row(
            one.worker,
            _share(one.utilisation),
            f"{one.requests:,}",
            "" if is_decode else f"{one.prompt_tokens:,}",
            "" if is_decode else _share(one.hit_rate),
            f"{one.answer_tokens:,}" if one.answer_tokens else "",
            str(one.waiting_peak or ""),
            str(one.running_peak or ""),
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.3f} s"


def _milliseconds(value: float) -> str:
    return f"{value * 1_000:.2f} ms"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _finished(one: Summary) -> str:
    return f"all {one.finished:,}" if one.finished == one.requests else f"{one.finished:,} of {one.requests:,}"


def _placed(one: Summary) -> str:
    """Share of the requests for which there was a choice that aggregated workers served."""
    local = sum(count for name, count in one.placements.items() if Placement(name).is_local)
    decided = sum(one.placements.values())
    return _share(local / decided) if decided else "-"


FIGURES: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("requests finished", _finished),
    ("TTFT mean", lambda one: _seconds(one.ttft_s.mean)),
    ("TTFT p50", lambda one: _seconds(one.ttft_s.p50)),
    ("TTFT p90", lambda one: _seconds(one.ttft_s.p90)),
    ("TTFT p99", lambda one: _seconds(one.ttft_s.p99)),
    ("queue in the frontend, mean", lambda one: _seconds(one.queue_s.mean)),
    ("ITL mean", lambda one: _milliseconds(one.itl_s.mean)),
    ("ITL p99", lambda one: _milliseconds(one.itl_s.p99)),
    ("between two tokens, p99", lambda one: _milliseconds(one.gap_s.p99)),
    ("on aggregated workers", _placed),
    ("hit rate", lambda one: _share(one.hit_rate)),
    ("prompt tokens/s", lambda one: f"{one.prompt_tokens_per_s:,.0f}"),
    ("answer tokens/s", lambda one: f"{one.answer_tokens_per_s:,.0f}"),
    ("prefill busy", lambda one: _share(one.prefill_utilisation)),
    ("decode busy", lambda one: _share(one.decode_utilisation)),
    ("busiest prefill / mean, busy time", lambda one: f"{one.busiest:.2f}"),
    ("least prefill / mean, requests", lambda one: f"{one.least_loaded:.2f}"),
)
