"""Statistics of streams: pure functions from arrival times to the numbers of a report."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Streamed:
    """One request as its client saw it. Times are seconds on one monotonic clock."""

    begin_s: float
    arrivals_s: tuple[float, ...]
    """Of each token; tokens of one message arrive at the same time."""
    failure: str | None = None
    moved_bytes: int | None = None
    recomputed_tokens: int | None = None
    moving_s: float | None = None
    """From the first page that was written to the word that all had arrived."""
    token_ids: tuple[int, ...] = ()
    end_s: float | None = None
    """When its client received the end."""
    workers: tuple[str, ...] = ()
    """Prefill and decode worker, or the aggregated one, of its first attempt."""
    attempts: int = 1
    in_order: bool = True
    """Whether its chunks had contiguous indices."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrivals_s[0] - self.begin_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens (ITL); 0 between tokens of one message."""
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile: a value that really occurred."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Median, tail and maximum, in milliseconds; empty for no values."""
    if not values_s:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    measurements = {name: round(1e3 * quantile(values_s, share), 3) for name, share in shares.items()}
    return {**measurements, "max": round(1e3 * max(values_s), 3), "mean": round(1e3 * statistics.fmean(values_s), 3)}


def summary(streams: Sequence[Streamed]) -> dict[str, object]:
    """Statistics of a load level. Failed streams are counted, and excluded from all other numbers."""
    good = _good(streams)
    failures = sorted({stream.failure for stream in streams if stream.failure is not None})
    measurements: dict[str, object] = {
        "requests": len(streams),
        "failed": len(streams) - len(good),
        "failures": failures[:5],
    }
    if not good:
        return measurements
    wall_s = _wall_s(good)
    tokens = sum(len(s.arrivals_s) for s in good)
    # A stream's own mean: what a reader of it sees, whatever the messages' sizes.
    paces_s = [statistics.fmean(s.gaps_s) for s in good if s.gaps_s]
    return {
        **measurements,
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(tokens / wall_s, 1),
        "ttft_ms": spread_ms([s.ttft_s for s in good]),
        "itl_ms": spread_ms([gap for s in good for gap in s.gaps_s]),
        "tpot_ms": spread_ms(paces_s),
    }


def by_worker(streams: Sequence[Streamed]) -> dict[str, int]:
    """How many streams each worker had in their first attempt."""
    return dict(sorted(Counter(name for stream in streams for name in stream.workers).items()))


def transfers(streams: Sequence[Streamed]) -> dict[str, object]:
    """Bytes and pace of the KV that moved for these requests."""
    moved = [s for s in streams if s.moved_bytes is not None and s.moving_s]
    if not moved:
        return {}
    paces = [s.moved_bytes / s.moving_s / 1e9 for s in moved if s.moved_bytes is not None and s.moving_s]
    return {
        "requests": len(moved),
        "bytes": sum(s.moved_bytes or 0 for s in moved),
        "recomputed_tokens": sum(s.recomputed_tokens or 0 for s in moved),
        "moving_ms": spread_ms([s.moving_s for s in moved if s.moving_s]),
        "gbytes_per_s_p50": round(quantile(paces, 0.5), 2),
        "gbytes_per_s_max": round(max(paces), 2),
    }


def within(streams: Sequence[Streamed], begin_s: float, end_s: float) -> list[float]:
    """Gaps that ended between two moments."""
    gaps = []
    for stream in streams:
        for earlier, later in zip(stream.arrivals_s, stream.arrivals_s[1:], strict=False):
            if begin_s <= later <= end_s:
                gaps.append(later - earlier)
    return gaps


def gaps_between_arrivals_s(stream: Streamed) -> list[float]:
    """Between what came at different moments: one gap, however many tokens a message held."""
    moments_s = list(dict.fromkeys(stream.arrivals_s))
    return [later - earlier for earlier, later in itertools.pairwise(moments_s)]


def steady_window_s(streams: Sequence[Streamed]) -> tuple[float, float]:
    """While all streams run: from the last one's first token to the first one's end. Empty if they never do."""
    return max(stream.arrivals_s[0] for stream in streams), min(stream.arrivals_s[-1] for stream in streams)


def steady_tokens_per_s(streams: Sequence[Streamed]) -> float | None:
    """Pace in the steady window; None if there is none."""
    begin_s, end_s = steady_window_s(streams)
    if end_s <= begin_s:
        return None
    tokens = sum(begin_s < arrival_s <= end_s for stream in streams for arrival_s in stream.arrivals_s)
    return tokens / (end_s - begin_s)


def steady_gaps_s(streams: Sequence[Streamed]) -> list[float]:
    """Gaps between arrivals in the steady window: without those that other streams' prompts make at the beginning."""
    begin_s, end_s = steady_window_s(streams)
    return [
        gap_s
        for stream in streams
        for gap_s in gaps_between_arrivals_s(
            replace(stream, arrivals_s=tuple(at_s for at_s in stream.arrivals_s if begin_s <= at_s <= end_s))
        )
    ]


def decoding(streams: Sequence[Streamed]) -> dict[str, Any]:
    """What many streams at once came to, in tokens/s and ms. Failed ones are counted, and nothing else has them."""
    good = _good(streams)
    reasons = sorted({stream.failure for stream in streams if stream.failure is not None})
    found: dict[str, Any] = {"failed": len(streams) - len(good), "failures": reasons[:2]}
    if not good:
        return found
    tokens, steady = sum(len(s.arrivals_s) for s in good), steady_tokens_per_s(good)
    means_s = [statistics.fmean(s.gaps_s) for s in good if s.gaps_s]
    gaps_s = [gap for s in good for gap in gaps_between_arrivals_s(s)]
    steady_s = steady_gaps_s(good)
    return {
        **found,
        "tokens": tokens,
        "wall_s": round(_wall_s(good), 3),
        "tokens_per_s": round(tokens / _wall_s(good), 1),
        "steady_tokens_per_s": None if steady is None else round(steady, 1),
        "itl_mean_p50_ms": round(1e3 * quantile(means_s, 0.5), 3) if means_s else None,
        "gap_p99_ms": round(1e3 * quantile(gaps_s, 0.99), 3) if gaps_s else None,
        "steady_gap_p99_ms": round(1e3 * quantile(steady_s, 0.99), 3) if steady_s else None,
        "ttft_p50_ms": round(1e3 * quantile([s.ttft_s for s in good], 0.5), 3),
    }


def cores(streams: Sequence[Streamed], cpu_s: Mapping[str, float]) -> dict[str, float]:
    """How many cores each process kept busy: its processor seconds over the time that the streams took."""
    good = _good(streams)
    return {name: round(spent_s / _wall_s(good), 2) for name, spent_s in cpu_s.items()} if good else {}


def ratios(bare: Mapping[str, Any], tandem: Mapping[str, Any]) -> dict[str, float | None]:
    """Tandem's measurements over the bare engine's, of two results of `decoding`; None where one side has none."""
    found: dict[str, float | None] = {}
    for name in ("steady_tokens_per_s", "gap_p99_ms", "steady_gap_p99_ms"):
        ours, theirs = tandem.get(name), bare.get(name)
        found[name] = round(ours / theirs, 3) if ours and theirs else None
    return found


def _good(streams: Sequence[Streamed]) -> list[Streamed]:
    return [stream for stream in streams if stream.failure is None and stream.arrivals_s]


def _wall_s(streams: Sequence[Streamed]) -> float:
    """From the first request's begin to the last token."""
    return max(s.arrivals_s[-1] for s in streams) - min(s.begin_s for s in streams)
