"""The search for the fewest workers: bisection over counts, because one more worker makes no fleet miss.

Owns which candidates are replayed, and the bound on their number. Knows neither traces nor engines: it asks a judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from tandem_frontend.replay.planning.candidate import Candidate
from tandem_frontend.replay.planning.counts import Counts
from tandem_frontend.replay.planning.estimate import Estimate

Judge = Callable[[Counts, int], Candidate]
"""Replays a fleet with a seed."""


class Shape(StrEnum):
    """Which fleets are searched."""

    ANY = "any"
    PAIRS = "pairs"
    AGGREGATED = "aggregated"


class _BoundReachedError(Exception):
    """No more replays are allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a search found."""

    best: Candidate | None
    """The fewest workers that reach the goals; None: no fleet did."""
    confirmation: Candidate | None
    """The same fleet with another seed; None: the bound was reached before."""
    smaller: tuple[Candidate, ...]
    """Fleets of one worker fewer than the best one, of any shape; all miss."""
    tried: tuple[Candidate, ...]
    """All candidates, in the order of their replays."""
    is_complete: bool
    """Whether the search ended by itself, not by the bound on replays."""


class Search:
    """One search."""

    def __init__(
        self, judge: Judge, guess: Estimate, shape: Shape, *, seed: int, workers_max: int, replays_max: int
    ) -> None:
        self._judge = judge
        self._guess = guess
        self._shape = shape
        self._seed = seed
        self._workers_max = workers_max
        self._left = replays_max
        self._known: dict[Counts, Candidate] = {}
        self._confirmed: dict[Counts, Candidate] = {}
        self._tried: list[Candidate] = []

    def run(self, present: Counts | None = None) -> Outcome:
        """Search; `present` is a fleet that is replayed first, to compare."""
        is_complete = True
        try:
            if present is not None:
                self._replay(present)
            # A fleet that does not hold is known to miss from then on, or a smaller one to reach: the next one is new.
            while not self._holds(self._fewest()):
                continue
        except _BoundReachedError:
            is_complete = False
        best = self._best()
        smaller = tuple(self._one_fewer(best)) if best else ()
        return Outcome(
            best=self._known[best] if best else None,
            confirmation=self._confirmed.get(best) if best else None,
            smaller=smaller,
            tried=tuple(self._tried),
            is_complete=is_complete,
        )

    def _one_fewer(self, best: Counts) -> Iterator[Candidate]:
        """What was replayed with one worker fewer; those that lack one of the best fleet's first."""
        near = set(best.smaller())
        fewer = [one for counts, one in self._known.items() if counts.total == best.total - 1 and not one.reaches]
        yield from sorted(fewer, key=lambda one: (one.counts not in near, one.counts))

    # --- Candidates

    def _reaches(self, counts: Counts) -> bool:
        return self._replay(counts).reaches

    def _replay(self, counts: Counts) -> Candidate:
        if counts not in self._known:
            self._known[counts] = self._spend(counts, self._seed)
        return self._known[counts]

    def _spend(self, counts: Counts, seed: int) -> Candidate:
        if self._left == 0:
            raise _BoundReachedError
        self._left -= 1
        candidate = self._judge(counts, seed)
        self._tried.append(candidate)
        return candidate

    def _holds(self, best: Counts | None) -> bool:
        """Whether a fleet reaches the goals with another seed too, and no smaller one does; None: no fleet does."""
        if best is None:
            return True
        if best not in self._confirmed:
            again = self._spend(best, self._seed + 1)
            if not again.reaches:
                self._known[best] = again
                return False
            self._confirmed[best] = again
        # All of them are replayed: the report says why each misses.
        fewer = [self._reaches(one) for one in best.smaller() if self._is_searched(one)]
        return not any(fewer)

    def _is_searched(self, counts: Counts) -> bool:
        if self._shape is Shape.PAIRS:
            return not counts.aggregated
        return self._shape is Shape.ANY or not counts.prefill

    def _best(self) -> Counts | None:
        """The smallest fleet that is known to reach the goals; of equals the one with more requests within them."""
        reaching = [one for one in self._known.values() if one.reaches and self._is_allowed(one.counts)]
        best = min(reaching, key=lambda one: (one.counts.total, -one.within, one.counts), default=None)
        return best.counts if best else None

    def _is_allowed(self, counts: Counts) -> bool:
        return counts.total <= self._workers_max and self._is_searched(counts)

    # --- Shapes

    def _fewest(self) -> Counts | None:
        if self._shape is not Shape.PAIRS:
            guess = math.ceil(self._guess.aggregated)
            fewest(guess, self._workers_max, lambda count: self._reaches(Counts(aggregated=count)))
        if self._shape is not Shape.AGGREGATED:
            self._pairs()
        if self._shape is Shape.ANY:
            self._mixed()
        return self._best()

    def _most(self) -> int:
        """The largest fleet that is still of interest: as large as the best one known, which it may equal."""
        best = self._best()
        return self._workers_max if best is None else best.total

    def _pairs(self) -> None:
        """The least of each role beside enough of the other; together, or with the fewest more, they are the least."""
        most = self._most() - 1
        if most < 1:
            return
        ample = self._ample(most)
        if ample is None:
            return
        prefill = fewest(
            math.ceil(self._guess.prefill),
            min(most, ample.prefill),
            lambda count: self._reaches(Counts(count, ample.decode)),
        )
        if prefill is None or prefill >= self._most():
            return
        decode = fewest(
            math.ceil(self._guess.decode),
            min(self._most() - prefill, ample.decode),
            lambda count: self._reaches(Counts(ample.prefill, count)),
        )
        if decode is None:
            return
        for total in range(prefill + decode, self._workers_max + 1):
            # Of equal fleets of different shapes, the better one is chosen: one of the best size is still tried.
            if total > self._most():
                return
            splits = list(_pairs_of(total, 0, prefill, decode))
            if any(self._reaches(one) for one in self._by_load(splits)):
                return

    def _ample(self, most: int) -> Counts | None:
        """A pair fleet with twice what is guessed, or more: enough of each role, if any is."""
        prefill, decode = (min(most, 2 * math.ceil(one) + 1) for one in (self._guess.prefill, self._guess.decode))
        while not self._reaches(Counts(prefill, decode)):
            if prefill == decode == most:
                return None
            prefill, decode = min(most, 2 * prefill), min(most, 2 * decode)
        return Counts(prefill, decode)

    def _mixed(self) -> None:
        """Fewer workers than the best fleet, of all three roles. A guess: their counts have no order to bisect."""
        while (best := self._best()) is not None and best.total > 3:
            likely = self._likely_mixtures(best.total - 1)
            if not any(self._reaches(one) for one in likely):
                return

    def _likely_mixtures(self, total: int) -> list[Counts]:
        """Few, medium and many aggregated workers, each beside the most evenly loaded pairs."""
        numbers = sorted({1, (total - 1) // 2, total - 2})
        return [self._by_load(list(_pairs_of(total - number, number)))[0] for number in numbers]

    def _by_load(self, candidates: list[Counts]) -> list[Counts]:
        """The most evenly loaded pairs first, by the guess."""

        def load(one: Counts) -> float:
            return max(self._guess.prefill / one.prefill, self._guess.decode / one.decode)

        return sorted(candidates, key=lambda one: (load(one), one))


def _pairs_of(total: int, aggregated: int = 0, prefill_min: int = 1, decode_min: int = 1) -> Iterator[Counts]:
    """All ways to split `total` workers into prefill and decode ones."""
    for prefill in range(prefill_min, total - decode_min + 1):
        yield Counts(prefill, total - prefill, aggregated)


def fewest(guess: int, most: int, reaches: Callable[[int], bool]) -> int | None:
    """The smallest count from 1 to `most` that reaches the goals, if all larger ones do too; None: `most` does not.

    Steps that double lead away from the guess until one count misses and a larger one reaches, then it bisects: about
    twice the logarithm of the guess's error, not of `most`.
    """
    misses, found, step = 0, most + 1, 1
    at = min(max(1, guess), most)
    while found - misses > 1:
        if reaches(at):
            found = at
        else:
            misses = at
        if found > most:
            at = min(most, misses + step)
        elif misses == 0:
            at = max(1, found - step)
        else:
            at = (misses + found) // 2
        step *= 2
    return found if found <= most else None
