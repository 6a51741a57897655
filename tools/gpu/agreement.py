"""Whether streams have the tokens that they should have, and what a killed or restarted worker cost them.

Pure functions from streams to the numbers of a report. Greedy tokens on a CPU in float32 are those of an undisturbed
run; in bfloat16 other batches change the last bits and so, now and then, a token, after which a stream is another one.
So equal streams are counted beside tokens: those up to the first difference, and those that are equal one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tools.gpu.summaries import Streamed, by_worker, quantile

Tokens = Sequence[int]


def agreement(streams: Sequence[Tokens], references: Sequence[Tokens]) -> dict[str, Any]:
    """How far streams agree with others, in the same order."""
    pairs = list(zip(streams, references, strict=True))
    first = [first_difference(one, other) for one, other in pairs]
    tokens = sum(len(other) for _, other in pairs)
    same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    before = sum(len(other) if at is None else at for at, (_, other) in zip(first, pairs, strict=True))
    return {
        "streams": len(pairs),
        "streams_equal": first.count(None),
        "tokens": tokens,
        "tokens_equal": same,
        "tokens_before_first_difference": before,
        "first_differences_at": sorted(at for at in first if at is not None),
    }


def first_difference(one: Tokens, other: Tokens) -> int | None:
    """Index of the first token that differs, or that only one has; None: they are equal."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return None if len(one) == len(other) else min(len(one), len(other))


def per_token(answers: Sequence[int | None], expected: Tokens) -> dict[str, Any]:
    """Agreement where each token was asked for by itself, after the same tokens: no difference has a second one."""
    same = sum(answer == token for answer, token in zip(answers, expected, strict=True))
    failed = sum(answer is None for answer in answers)
    return {"tokens": len(expected), "equal": same, "failed": failed, "share": _share(same, len(expected))}


def whole(streams: Sequence[Streamed], new_tokens: int) -> dict[str, Any]:
    """Streams that were lost, and those that have each token once: as many as asked for, in contiguous chunks."""
    lost = [stream.failure for stream in streams if stream.failure is not None]
    counted = [s.failure is None and s.in_order and len(s.arrivals_s) == new_tokens for s in streams]
    return {
        "streams": len(streams),
        "lost": len(lost),
        "failures": sorted(set(lost))[:3],
        "whole": sum(counted),
        "continued": sum(s.failure is None and s.attempts > 1 for s in streams),
    }


def takeover(
    streams: Sequence[Streamed], references: Sequence[Tokens], victim: str, struck_s: float, new_tokens: int
) -> dict[str, Any]:
    """What the death of a worker did to the streams that it served, and to the others.

    Times until a stream went on are in ms: to its first token after `struck_s` where it had none, else the longest
    pause between two tokens that ended afterwards. Tokens that were on their way already are so no sign of life.
    """
    running = [s for s in streams if s.begin_s < struck_s and (s.end_s is None or s.end_s > struck_s)]
    hit = [s for s in running if victim in s.workers and s.attempts > 1]
    others = [s for s in running if s not in hit]
    return {
        **whole(streams, new_tokens),
        "on_the_victim": sum(victim in s.workers for s in running),
        "went_on": len(hit),
        "went_on_after_ms": _times_ms([pause_s(s, struck_s) for s in hit]),
        "others_longest_pause_ms": _times_ms([pause_s(s, struck_s) for s in others]),
        "tokens": agreement([s.token_ids for s in streams], references),
    }


def pause_s(stream: Streamed, struck_s: float) -> float | None:
    """The longest pause of a stream that ended after a moment; None: no token came after it."""
    if not stream.arrivals_s or stream.arrivals_s[-1] <= struck_s:
        return None
    if stream.arrivals_s[0] > struck_s:
        return stream.arrivals_s[0] - struck_s
    return max(later - earlier for earlier, later in pairwise(stream.arrivals_s) if later > struck_s)


def restarts(streams: Sequence[Streamed], new_tokens: int) -> dict[str, Any]:
    """What a rolling restart did to the streams that ran meanwhile."""
    good = [s for s in streams if s.failure is None and s.arrivals_s]
    gaps_s = [max(s.gaps_s, default=0.0) for s in good]
    return {
        **whole(streams, new_tokens),
        "by_worker": by_worker(streams),
        "ttft_ms": _times_ms([s.ttft_s for s in good]),
        "longest_pause_of_a_stream_ms": _times_ms(gaps_s),
    }


def _times_ms(times_s: Sequence[float | None]) -> dict[str, float]:
    known = [time_s for time_s in times_s if time_s is not None]
    if not known:
        return {}
    return {"p50": round(1e3 * quantile(known, 0.5), 1), "max": round(1e3 * max(known), 1)}


def _share(part: int, whole_count: int) -> float | None:
    return round(part / whole_count, 4) if whole_count else None
