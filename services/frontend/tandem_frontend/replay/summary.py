"""The figures of a replay: latencies, hit rate, throughput and utilisation, for each worker and in all.

Pure. Owns what each figure means; `report` prints them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.frontend import FINISHED, Served
from tandem_frontend.replay.simulation import Replay


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles of one figure."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values; all zero without any. A quantile is the smallest value that so many are not above."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0)
        ordered = sorted(values)
        quantiles = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99))
        return cls(fmean(ordered), *quantiles)

    @classmethod
    def weighted(cls, values: Sequence[tuple[float, int]]) -> Spread:
        """As `of`, each value so many times."""
        if not values:
            return cls.of(())
        ordered = sorted(values)
        ends = list(accumulate(count for _, count in ordered))
        quantiles = (ordered[bisect_left(ends, -(-ends[-1] * percent // 100))][0] for percent in (50, 90, 99))
        return cls(sum(value * count for value, count in ordered) / ends[-1], *quantiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFigures:
    """What one worker has done."""

    worker: str
    role: str
    utilisation: float
    """Share of the replay in which its engine computed."""
    requests: int
    """Prompts computed; of a decode worker: answers begun."""
    prompt_tokens: int
    cached_tokens: int
    hit_rate: float
    answer_tokens: int
    waiting_peak: int
    """Prompts that waited in the engine at once, at most."""
    running_peak: int
    """Requests that generated at once, at most."""
    transferred_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one policy."""

    policy: str
    requests: int
    finished: int
    outcomes: dict[str, int]
    """Requests that did not finish, by reason."""
    duration_s: float
    """From the first arrival to the last end."""
    ttft_s: Spread
    itl_s: Spread
    """Over requests of at least two tokens, each with its mean."""
    gap_s: Spread
    """Single times between two tokens, over all tokens."""
    queue_s: Spread
    """Wait in the frontends' queues."""
    placements: dict[str, int]
    """Finished requests by the reason of their placement; empty: there was nothing to decide."""
    hit_rate: float
    """Prompt tokens found in the caches of the workers that computed them, of all prompt tokens."""
    prompt_tokens_per_s: float
    answer_tokens_per_s: float
    prefill_utilisation: float
    """Mean over the workers that compute prompts."""
    decode_utilisation: float
    least_loaded: float
    """Prompts of the worker with the fewest, as a share of the mean over the workers that compute prompts."""
    busiest: float
    """Busy time of the busiest of them, as a multiple of their mean."""
    workers: tuple[WorkerFigures, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain objects."""
        return asdict(self)


def summary_of(replay: Replay) -> Summary:
    """The figures of a replay."""
    finished = [one for one in replay.served if one.outcome == FINISHED]
    workers = tuple(_worker(engine, replay.end_s) for engine in replay.engines)
    prompts = [one for one in workers if one.role != WorkerRole.DECODE.value]
    answers = [one for one in workers if one.role != WorkerRole.PREFILL.value]
    prompt_tokens = sum(one.prompt_tokens for one in finished)
    mean_requests, mean_busy = (fmean(getattr(one, name) for one in prompts) for name in ("requests", "utilisation"))
    return Summary(
        policy=replay.policy,
        requests=len(replay.served),
        finished=len(finished),
        outcomes=dict(Counter(one.outcome for one in replay.served if one.outcome != FINISHED)),
        duration_s=replay.end_s,
        ttft_s=Spread.of([one.ttft_s for one in finished]),
        itl_s=Spread.of([one.itl_s for one in finished if one.answer_tokens > 1]),
        gap_s=Spread.weighted([gap for engine in replay.engines for gap in engine.batch.gaps]),
        queue_s=Spread.of([one.queue_s for one in finished]),
        placements=dict(Counter(one.placement for one in finished if one.placement)),
        hit_rate=_ratio(sum(one.cached_tokens for one in finished), prompt_tokens),
        prompt_tokens_per_s=_ratio(prompt_tokens, replay.end_s),
        answer_tokens_per_s=_ratio(sum(one.answer_tokens for one in finished), replay.end_s),
        prefill_utilisation=mean_busy,
        decode_utilisation=fmean(one.utilisation for one in answers),
        least_loaded=_ratio(min(one.requests for one in prompts), mean_requests),
        busiest=_ratio(max(one.utilisation for one in prompts), mean_busy),
        workers=workers,
    )


def rows_of(served: Sequence[Served]) -> list[dict[str, Any]]:
    """Each request as a plain object."""
    return [asdict(one) for one in served]


def _worker(engine: AccountedEngine, end_s: float) -> WorkerFigures:
    figures, batch = engine.figures, engine.batch
    is_decode = engine.worker.role is WorkerRole.DECODE
    return WorkerFigures(
        worker=engine.worker.worker_id,
        role=engine.worker.role.value,
        utilisation=_ratio(figures.busy_s, end_s),
        requests=batch.begun_count if is_decode else figures.prompts_count,
        prompt_tokens=figures.prompt_tokens,
        cached_tokens=figures.cached_tokens,
        hit_rate=_ratio(figures.cached_tokens, figures.prompt_tokens),
        answer_tokens=batch.emitted_tokens,
        waiting_peak=figures.waiting_peak,
        running_peak=batch.peak,
        transferred_bytes=figures.transferred_bytes,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
