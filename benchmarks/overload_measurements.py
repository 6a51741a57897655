"""Statistics and goals of `benchmarks.overload`: pure, so that both can be tested.

A request is good if it has finished within its deadline. Requests are counted by the time at which they end, between
the end of the warm-up and the end of the arrivals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.overload_load import IDLE, Asked

GOODPUT_SHARE_MIN = 0.95
"""Of the peak, however much more is offered."""
REFUSAL_P99_MAX_MS = 10.0
MEMORY_GROWTH_MAX_MIB = 8.0
"""From the third minute to the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What one load came to."""

    offered_per_s: float
    asked_per_s: float
    """That really were sent; fewer than offered: the load generator was too slow."""
    good_per_s: float
    refused_share: float
    refusal_p50_ms: float
    refusal_p99_ms: float
    refusals_without_retry_info: int
    late_share: float
    """Whose deadline passed, of all that was asked: in the queue, or at an engine."""
    wasted_tokens_share: float
    """Tokens that reached clients whose requests were not good, of all tokens."""
    first_token_p50_s: float
    generator_lag_p99_ms: float
    """By how much requests were sent too late: a limit of what this run can show."""
    idle_p50_ms: float
    idle_p99_ms: float
    """What a question to an idle process took beside it: what is due to the machine, and not to the frontend."""
    outcomes: dict[str, int]


def measurements_of(asked: Sequence[Asked], offered_per_s: float, warm_up_s: float, seconds: float) -> Measurements:
    """Count a load between the end of its warm-up and the end of its arrivals."""
    window_s = seconds - warm_up_s
    idle_ms = [1e3 * (one.end_s - one.start_s) for one in asked if one.outcome == IDLE and one.start_s >= warm_up_s]
    asked = [one for one in asked if one.outcome != IDLE]
    sent = [one for one in asked if one.start_s >= warm_up_s]
    ended = [one for one in asked if warm_up_s <= one.end_s < seconds]
    good = [one for one in ended if is_good(one)]
    refused = [one for one in sent if one.outcome == "OVERLOADED"]
    times_ms = [1e3 * (one.end_s - one.start_s) for one in refused]
    tokens = sum(one.tokens for one in sent)
    return Measurements(
        offered_per_s=offered_per_s,
        asked_per_s=len(sent) / window_s,
        good_per_s=len(good) / window_s,
        refused_share=_share(len(refused), len(sent)),
        refusal_p50_ms=percentile(times_ms, 0.5),
        refusal_p99_ms=percentile(times_ms, 0.99),
        refusals_without_retry_info=sum(not one.retry_delay_s for one in refused),
        late_share=_share(sum(one.outcome == "DEADLINE_EXCEEDED" for one in sent), len(sent)),
        wasted_tokens_share=_share(sum(one.tokens for one in sent if not is_good(one)), tokens),
        first_token_p50_s=percentile([one.first_token_s - one.start_s for one in good if one.first_token_s], 0.5),
        generator_lag_p99_ms=percentile([1e3 * (one.start_s - one.due_s) for one in sent], 0.99),
        idle_p50_ms=percentile(idle_ms, 0.5),
        idle_p99_ms=percentile(idle_ms, 0.99),
        outcomes=dict(Counter(one.outcome for one in sent)),
    )


def is_good(asked: Asked) -> bool:
    """Whether its client has its whole answer in time."""
    return asked.outcome == "finished" and asked.end_s - asked.start_s <= asked.deadline_s


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def memory_growth_mib(samples: Sequence[tuple[float, float]], from_s: float) -> float:
    """From the first half minute after a time to the last half minute, each by its mean. Samples are (time, MiB)."""
    later = [(time_s, mib) for time_s, mib in samples if time_s >= from_s]
    if not later:
        return 0.0
    begin_s, end_s = later[0][0], later[-1][0]
    first = [mib for time_s, mib in later if time_s < begin_s + 30]
    last = [mib for time_s, mib in later if time_s > end_s - 30]
    return sum(last) / len(last) - sum(first) / len(first)


def missed(peak_per_s: float, loads: dict[str, Measurements], growth_mib: float | None) -> list[str]:
    """The goals that are missed, each in a sentence. `loads` are those beyond the search, by their name."""
    problems = []
    for name, measurements in loads.items():
        if measurements.good_per_s < GOODPUT_SHARE_MIN * peak_per_s:
            share = 100 * _share(measurements.good_per_s, peak_per_s)
            problems.append(f"{name}: goodput {measurements.good_per_s:.1f}/s is {share:.0f} % of the peak")
        if measurements.refused_share and measurements.refusal_p99_ms > REFUSAL_P99_MAX_MS:
            problems.append(f"{name}: refusals take {measurements.refusal_p99_ms:.1f} ms at the 99th percentile")
        if measurements.refusals_without_retry_info:
            problems.append(f"{name}: {measurements.refusals_without_retry_info} refusals without RetryInfo")
    if growth_mib is not None and growth_mib > MEMORY_GROWTH_MAX_MIB:
        problems.append(f"the frontends grew by {growth_mib:.1f} MiB")
    return problems


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
