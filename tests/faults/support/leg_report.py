"""One line for each scenario of the fault suite, made from its history: how many, how they ended, how soon.

Owns the results and their form. Judges nothing; `conftest.py` prints the lines at the end of a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.support.history import Asked, History, percentile

LINES: list[str] = []
"""Of the scenarios of this run, in their order."""
_COUNTED: list[Results] = []

SCENARIO_CHARS = 59
COUNTS = ("asked", "failed", "continued", "again", "refused", "duplicated")

HEAD = (
    f"{'scenario':<{SCENARIO_CHARS + 1}}{'asked':>6}{'failed':>7}{'cont.':>6}{'again':>6}{'refused':>8}{'twice':>6}"
    f"{'detect ms':>11}{'recover ms: median, worst':>27}"
)


@dataclass(frozen=True, slots=True)
class Results:
    """What one scenario came to."""

    asked: int
    failed: int
    continued: int
    """Went on elsewhere after tokens had been passed on."""
    again: int
    """Broke before their first token and were begun again, or were not taken at first."""
    refused: int
    """Failed before a worker had taken them."""
    duplicated: int
    """Streams with a chunk out of place, or with more than one ending."""
    detect_s: float | None
    """From the fault to the first leg sent elsewhere because of it; None: not known."""
    gaps_s: tuple[float, ...]
    """Of those that lost their workers: from the fault to their next token."""


def results_of(history: History, fault_s: float, detect_s: float | None = None) -> Results:
    """Count a history around a fault."""
    lost = [asked for asked in history.asked if asked.went_on and asked.runs_at(fault_s)]
    gaps = [gap for asked in lost if (gap := asked.gap_after_s(fault_s)) is not None]
    continued = sum(asked.went_on and _had_tokens(asked, fault_s) for asked in history.asked)
    again = sum((asked.last_attempt or 1) > 1 for asked in history.asked) - continued
    return Results(
        asked=len(history),
        failed=len(history.failed()),
        continued=continued,
        again=again,
        refused=len(history.failed().where(lambda asked: asked.accepted_s is None)),
        duplicated=len(history.where(lambda asked: asked.misplaced_count > 0 or asked.finish_count > 1)),
        detect_s=detect_s,
        gaps_s=tuple(gaps),
    )


def report(scenario: str, results: Results) -> None:
    """Add a scenario's line."""
    _COUNTED.append(results)
    LINES.append(_line(scenario, results))


def report_test(history: History, fault_s: float) -> None:
    """Add the line of the test that runs, for scenarios that have no other name."""
    name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    report(name.removeprefix("test_").replace("_", " ")[:SCENARIO_CHARS], results_of(history, fault_s))


def total() -> str:
    """All scenarios together."""
    sums = {name: sum(getattr(each, name) for each in _COUNTED) for name in COUNTS}
    detected = [each.detect_s for each in _COUNTED if each.detect_s is not None]
    gaps_s = tuple(gap_s for each in _COUNTED for gap_s in each.gaps_s)
    whole = Results(**sums, detect_s=max(detected, default=None), gaps_s=gaps_s)
    return _line(f"{len(_COUNTED)} scenarios (detect: the longest)", whole)


def _line(scenario: str, results: Results) -> str:
    return (
        f"{scenario:<{SCENARIO_CHARS + 1}}{results.asked:>6}{results.failed:>7}{results.continued:>6}{results.again:>6}"
        f"{results.refused:>8}{results.duplicated:>6}{_ms(results.detect_s):>11}{_spread(results.gaps_s):>27}"
    )


def _had_tokens(asked: Asked, fault_s: float) -> bool:
    return bool(asked.token_times_s) and asked.token_times_s[0] <= fault_s


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1_000:.0f}"


def _spread(gaps_s: Sequence[float]) -> str:
    return f"{_ms(percentile(gaps_s, 0.5))}, {_ms(max(gaps_s))}" if gaps_s else "-"
