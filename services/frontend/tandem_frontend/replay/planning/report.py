"""What a plan prints: its candidates, the answer, why one worker fewer misses; the JSON file.

Owns the layout; `candidate` has the figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tandem.errors import ConfigError
from tandem_frontend.replay.planning.candidate import Candidate
from tandem_frontend.replay.planning.counts import Counts
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.planning.search import Outcome
from tandem_frontend.replay.trace import TracedRequest


def load_of(trace: list[TracedRequest]) -> str:
    """The load in a sentence."""
    span_s = max(trace[-1].arrival_s, 1e-9)
    prompts, answers = (fmean(getattr(one, name) for one in trace) for name in ("prompt_tokens", "answer_tokens"))
    return (
        f"{len(trace):,} requests in {span_s:,.0f} s ({len(trace) / span_s:.3g}/s), on average {prompts:,.0f} prompt "
        f"and {answers:,.0f} answer tokens"
    )


def print_plan(console: Console, outcome: Outcome, goals: Goals) -> None:
    """Print the table of the candidates and the answer."""
    console.print(_candidates(outcome, goals))
    for line in _answer(outcome, goals):
        console.print(line, highlight=False, soft_wrap=True)


def write_json(file: Path, outcome: Outcome, settings: dict[str, Any]) -> None:
    """Write the answer and all candidates.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        "settings": settings,
        "plan": outcome.best.as_json() if outcome.best else None,
        "confirmation": outcome.confirmation.as_json() if outcome.confirmation else None,
        "smaller": [one.as_json() for one in outcome.smaller],
        "candidates": [one.as_json() for one in outcome.tried],
        "complete": outcome.is_complete,
    }
    try:
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as problem:
        raise ConfigError("json", f"{file} cannot be written: {problem.strerror}") from None


def _candidates(outcome: Outcome, goals: Goals) -> Table:
    table = Table(title=f"candidates, each from one replay; {goals.name}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("fleet")
    for heading in ("TTFT", "ITL", "within both", "queue", "busy", "refused", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sorted(outcome.tried, key=lambda one: (one.counts.total, one.counts, one.seed)):
        table.add_row(
            str(one.counts),
            _seconds(one.ttft_s),
            f"{one.itl_s * 1e3:.1f} ms",
            f"{one.within:.1%}",
            _seconds(one.queue_s),
            ", ".join(f"{share:.0%}" for share in one.busy.values()),
            f"{one.refused:,}" if one.refused else "",
            "reaches" if one.reaches else f"misses {_missed(one)}",
        )
    return table


def _answer(outcome: Outcome, goals: Goals) -> Iterator[str]:
    asked = f"TTFT {_seconds(goals.ttft_s)} and ITL {goals.itl_s * 1e3:g} ms at {goals.name}"
    best = outcome.best
    if best is None:
        yield f"no fleet of up to {goals.workers_max} workers that was replayed reaches {asked}"
        least = max(outcome.tried, key=lambda one: one.within, default=None)
        if least is not None:
            yield f"closest: {least.counts}, {least.within:.1%} within both; limited by {least.limit}"
    else:
        yield f"plan: {_workers(best.counts.total)}: {best.counts}: TTFT {_seconds(best.ttft_s)}, ITL " + (
            f"{best.itl_s * 1e3:.1f} ms; goals: {asked}"
        )
        for one in outcome.smaller:
            yield f"{_fewer(best.counts, one.counts)} misses {_missed(one)}: " + (
                f"TTFT {_seconds(one.ttft_s)}, ITL {one.itl_s * 1e3:.1f} ms, {one.within:.1%} within both; limited by "
                f"{one.limit}"
            )
        if outcome.confirmation is not None:
            again = outcome.confirmation
            yield f"with another seed: TTFT {_seconds(again.ttft_s)}, ITL {again.itl_s * 1e3:.1f} ms, " + (
                f"{again.within:.1%} within both"
            )
    if not outcome.is_complete:
        yield f"the search ended at its bound of {len(outcome.tried)} replays: fewer workers may do (--replays-max)"


def _fewer(best: Counts, counts: Counts) -> str:
    return f"one {best.missing(counts)} worker fewer" if counts in best.smaller() else str(counts)


def _missed(one: Candidate) -> str:
    return " and ".join(name for name, reaches in (("TTFT", one.reaches_ttft), ("ITL", one.reaches_itl)) if not reaches)


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _seconds(value_s: float) -> str:
    return "refused" if value_s == math.inf else f"{value_s:.3f} s"
