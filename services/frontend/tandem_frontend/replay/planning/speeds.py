"""The speeds of a cluster's engines, measured from its requests: options of the simulated engine.

Pure. Owns the two fits, each of a time that grows in a straight line. What was not seen is not guessed: see `Speeds`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from tandem.domain.recorded_load import RecordedRequest
from tandem.errors import StartError

Interval = tuple[float, float]
CHUNK_TOKENS = 8192
"""Most prompt tokens of one step, as SGLang's default on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the requests show. None: no request showed it."""

    prefill: tuple[float, float] | None
    """Seconds of a step over prompts, and of each token in it."""
    decode: tuple[float, float] | None
    """Seconds of a decode step, and of each request in it."""
    transfer_bytes_per_s: float | None
    batch_max: float
    """The largest number of requests that generated at a time: larger batches are extrapolated."""

    def options(self) -> dict[str, float | int]:
        """As options of the simulated engine; a transfer that was not seen takes no time."""
        assert self.prefill is not None, "asked for after a check"
        assert self.decode is not None, "asked for after a check"
        options: dict[str, float | int] = {
            "chunked_prefill_tokens": CHUNK_TOKENS,
            "prefill_step_s": self.prefill[0],
            "prefill_tokens_per_s": 1 / max(self.prefill[1], 1e-12),
            "decode_step_s": max(self.decode[0], 1e-9),
            "decode_request_s": self.decode[1],
        }
        if self.transfer_bytes_per_s is not None:
            options["transfer_bytes_per_s"] = self.transfer_bytes_per_s
        return options


def measured(requests: Sequence[RecordedRequest]) -> Speeds:
    """The speeds that some requests show."""
    prompts, answers = _by_worker(requests, _prompt), _by_worker(requests, _answer)
    stretches = [stretch for one in prompts.values() for stretch in _stretches(one)]
    rows: list[tuple[float, float, float]] = []
    for worker, streams in answers.items():
        interrupted = _merged([(begin, end) for begin, end, _ in prompts.get(worker, ())])
        rows += _decode_rows(streams, interrupted)
    moved = [one.transfer_bytes / one.transfer_s for one in requests if one.transfer_bytes and one.transfer_s]
    return Speeds(
        prefill=line_of(stretches) if stretches else None,
        decode=line_of(rows) if rows else None,
        transfer_bytes_per_s=median(moved) if moved else None,
        batch_max=max((row[1] for row in rows), default=0.0),
    )


def check_speeds(speeds: Speeds) -> None:
    """Refuse to plan with an engine whose speed is not known.

    Raises:
        StartError: names what no request showed.
    """
    for name, value, wanted in (
        ("prompts", speeds.prefill, "finished request whose prompt was not all cached"),
        ("decode steps", speeds.decode, "answer of at least 2 tokens"),
    ):
        if value is None:
            raise StartError(f"the speed of {name} is not known (no {wanted}): give --fleet with an [engine]")


def line_of(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The least squares fit of y = a * x1 + b * x2 over rows (x1, x2, y), with neither a nor b below 0."""
    s11, s12, s22, s1y, s2y = (
        sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    )
    determinant = s11 * s22 - s12 * s12
    if determinant > 1e-9 * s11 * s22:
        a, b = (s1y * s22 - s2y * s12) / determinant, (s2y * s11 - s1y * s12) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # One term explains it alone: the one that leaves less.
    alone = [(s1y / s11 if s11 else 0.0, 0.0), (0.0, s2y / s22 if s22 else 0.0)]
    return min(alone, key=lambda fit: sum((fit[0] * x1 + fit[1] * x2 - y) ** 2 for x1, x2, y in rows))


Work = tuple[float, float, int]
"""Begin and end of something that a worker did, and how many tokens it was."""


def _prompt(one: RecordedRequest) -> tuple[str, Work] | None:
    """The computation of a prompt."""
    if one.prompt_begin_s is None or one.prompt_end_s is None or one.prompt_tokens is None:
        return None
    tokens = one.prompt_tokens - one.cached_tokens
    is_work = one.prompt_end_s > one.prompt_begin_s and tokens > 0
    return (one.computed_by, (one.prompt_begin_s, one.prompt_end_s, tokens)) if is_work else None


def _answer(one: RecordedRequest) -> tuple[str, Work] | None:
    """The generation after the first token."""
    if one.first_token_s is None or one.last_token_s is None or one.answer_tokens < 2:
        return None
    is_work = one.last_token_s > one.first_token_s
    return (one.generated_by, (one.first_token_s, one.last_token_s, one.answer_tokens - 1)) if is_work else None


def _by_worker(
    requests: Iterable[RecordedRequest], work_of: Callable[[RecordedRequest], tuple[str, Work] | None]
) -> dict[str, list[Work]]:
    found: defaultdict[str, list[Work]] = defaultdict(list)
    for one in requests:
        work = work_of(one)
        if work is not None:
            found[work[0]].append(work[1])
    return found


def _stretches(prompts: Sequence[Work]) -> list[tuple[float, float, float]]:
    """(steps, tokens, seconds) of each stretch in which a worker computed prompts without a pause.

    Prompts of one step begin and end together, so that single ones show too long a time for their tokens.
    """
    stretches = []
    for begin_s, end_s in _merged([(begin, end) for begin, end, _ in prompts]):
        inside = [one for one in prompts if begin_s <= one[0] < end_s]
        ends = len({round(end, 6) for _, end, _ in inside})
        chunks = sum(-(-tokens // CHUNK_TOKENS) for _, _, tokens in inside)
        steps = max(ends, chunks - len(inside) + ends)
        stretches.append((float(steps), float(sum(tokens for _, _, tokens in inside)), end_s - begin_s))
    return stretches


def _decode_rows(answers: Sequence[Work], interrupted: Sequence[Interval]) -> list[tuple[float, float, float]]:
    """(1, mean number of requests that generated, time between tokens) of each answer, without the time of prompts."""
    rows = []
    for begin_s, end_s, steps in answers:
        together_s = sum(max(0.0, min(end_s, end) - max(begin_s, begin)) for begin, end, _ in answers)
        prompts_s = sum(max(0.0, min(end_s, end) - max(begin_s, begin)) for begin, end in interrupted)
        generating_s = end_s - begin_s - prompts_s
        if generating_s > 0:
            rows.append((1.0, together_s / (end_s - begin_s), generating_s / steps))
    return rows


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of some intervals, in order."""
    merged: list[Interval] = []
    for begin_s, end_s in sorted(intervals):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end_s)
        else:
            merged.append((begin_s, end_s))
    return merged
