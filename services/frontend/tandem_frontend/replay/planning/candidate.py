"""One candidate fleet, judged by its replay: the figures at the percentile of the goals, and what limits it.

Pure. Owns what "reaches the goals" means: both the TTFT and the ITL at the percentile, where a request that was refused
has no first token, ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem_frontend.replay.frontend import FINISHED, Served
from tandem_frontend.replay.planning.counts import ROLES, Counts
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.simulation import Replay

FULL = 0.9
"""From this share of its memory or its places on, decode makes the frontend's queue wait."""
PARTS = ("queue_s", "memory_s", "prefill_wait_s", "prompt_s", "handover_s")
"""Of a TTFT, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What one fleet does with the load. Times in seconds; `inf`: so many requests were refused."""

    counts: Counts
    seed: int
    requests: int
    refused: int
    """Requests that did not finish."""
    ttft_s: float
    """At the percentile."""
    itl_s: float
    """At the percentile, of requests of at least two tokens."""
    queue_s: float
    """Wait in the frontend's queue, at the percentile."""
    within: float
    """Share of the requests that are within both goals."""
    busy: dict[str, float]
    """Mean share of the time in which the engines of a role computed."""
    reaches_ttft: bool
    reaches_itl: bool
    limit: str
    """What takes the most time of the requests that are too late, or makes steps too long; empty: it reaches both."""

    @property
    def reaches(self) -> bool:
        """Whether it reaches both goals."""
        return self.reaches_ttft and self.reaches_itl

    def as_json(self) -> dict[str, Any]:
        """As plain objects; a time without an end is None."""
        fields = {name: None if value == math.inf else value for name, value in asdict(self).items()}
        return {**fields, "reaches": self.reaches}


def judged(counts: Counts, seed: int, replay: Replay, goals: Goals) -> Candidate:
    """The figures of a replay under the goals."""
    served = replay.served
    ttft_s = quantile([_ttft_s(one) for one in served], goals.percentile)
    itl_s = quantile(
        [one.itl_s for one in served if one.outcome == FINISHED and one.answer_tokens > 1], goals.percentile
    )
    reaches_ttft, reaches_itl = ttft_s <= goals.ttft_s, itl_s <= goals.itl_s
    limit = ""
    if not reaches_ttft:
        limit = _limit_of_ttft(replay, [one for one in served if _ttft_s(one) > goals.ttft_s])
    elif not reaches_itl:
        limit = _limit_of_itl(counts, replay)
    return Candidate(
        counts=counts,
        seed=seed,
        requests=len(served),
        refused=sum(one.outcome != FINISHED for one in served),
        ttft_s=ttft_s,
        itl_s=itl_s,
        queue_s=quantile([one.queue_s for one in served if one.outcome == FINISHED], goals.percentile),
        within=sum(_ttft_s(one) <= goals.ttft_s and one.itl_s <= goals.itl_s for one in served) / len(served),
        busy={role: share for role in ROLES if (share := _busy(replay, role)) is not None},
        reaches_ttft=reaches_ttft,
        reaches_itl=reaches_itl,
        limit=limit,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values is not above; 0 without any."""
    return sorted(values)[max(1, math.ceil(len(values) * share - 1e-9)) - 1] if values else 0.0


def _ttft_s(one: Served) -> float:
    return one.ttft_s if one.outcome == FINISHED else math.inf


def _busy(replay: Replay, role: str) -> float | None:
    """None: there is no such worker."""
    shares = [engine.figures.busy_s / replay.end_s for engine in replay.engines if engine.worker.role.value == role]
    return fmean(shares) if shares else None


def _limit_of_ttft(replay: Replay, late: Sequence[Served]) -> str:
    """The longest part of the late requests' way to their first token."""
    known = [one for one in late if one.outcome == FINISHED]
    if 2 * len(known) < len(late):
        reasons = sorted({one.outcome for one in late} - {FINISHED})
        return f"requests are refused ({', '.join(reasons)})"
    parts = {part: fmean(getattr(one, part) for one in known) for part in PARTS}
    longest = max(PARTS, key=parts.__getitem__)
    moved = "the KV transfer and " if _busy(replay, "decode") is not None else ""
    words: dict[str, Callable[[], str]] = {
        "queue_s": lambda: f"the frontend's queue, in front of {_fullest(replay)}",
        "memory_s": lambda: "the wait for KV memory of decode workers",
        "prefill_wait_s": lambda: "the wait for the prompts before it on its worker",
        "prompt_s": lambda: "the computation of the prompt itself",
        "handover_s": lambda: f"{moved}the wait for a place among the requests that generate",
    }
    return f"{words[longest]()} ({parts[longest]:.3g} s of {fmean(one.ttft_s for one in known):.3g} s)"


def _fullest(replay: Replay) -> str:
    """The role for which the frontend's queue waits."""
    for engine in replay.engines:
        if engine.worker.role is WorkerRole.DECODE:
            capabilities = engine.worker.capabilities
            memory = engine.memory.peak_tokens / capabilities.kv_capacity_tokens
            if max(memory, engine.batch.peak / capabilities.running_requests_max) >= FULL:
                return "prefill and decode" if (_busy(replay, "prefill") or 0) >= FULL else "decode"
    return "prefill" if _busy(replay, "prefill") is not None else "aggregated workers"


def _limit_of_itl(counts: Counts, replay: Replay) -> str:
    streams = [engine for engine in replay.engines if engine.worker.role is not WorkerRole.PREFILL]
    peak = max(engine.batch.peak for engine in streams)
    if counts.aggregated and not counts.decode:
        prompts = sum(engine.figures.prompts_s for engine in streams) / sum(engine.figures.busy_s for engine in streams)
        return f"prompts computed between decode steps ({prompts:.0%} of the busy time) and batches of up to {peak}"
    return f"decode steps of up to {peak} requests"
