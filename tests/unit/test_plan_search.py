"""The search of a plan: the fewest workers, in few replays, on judges whose answer is known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from tandem_frontend.replay.planning.candidate import Candidate
from tandem_frontend.replay.planning.counts import Counts
from tandem_frontend.replay.planning.estimate import Estimate
from tandem_frontend.replay.planning.search import Outcome, Search, Shape, fewest

MANY = 200


class ScriptedJudge:
    """Fleets that reach the goals by a rule. Counts what it is asked."""

    def __init__(self, reaches: Callable[[Counts], bool], unlucky: dict[int, set[Counts]] | None = None) -> None:
        """`unlucky`: fleets that miss with a seed all the same."""
        self._rule = reaches
        self._unlucky = unlucky or {}
        self.asked: list[tuple[Counts, int]] = []

    def __call__(self, counts: Counts, seed: int) -> Candidate:
        self.asked.append((counts, seed))
        assert counts.is_possible
        reaches = self._rule(counts) and counts not in self._unlucky.get(seed, ())
        return Candidate(
            counts=counts,
            seed=seed,
            requests=1,
            refused=0,
            ttft_s=0.0 if reaches else math.inf,
            itl_s=0.0,
            queue_s=0.0,
            within=float(reaches),
            busy={},
            reaches_ttft=reaches,
            reaches_itl=True,
            limit="" if reaches else "the test",
        )


def searched(
    judge: ScriptedJudge,
    guess: tuple[float, float] = (1, 1),
    shape: Shape = Shape.ANY,
    workers_max: int = 64,
    replays_max: int = MANY,
    present: Counts | None = None,
) -> Outcome:
    estimate = Estimate(prefill=guess[0], decode=guess[1])
    search = Search(judge, estimate, shape, seed=0, workers_max=workers_max, replays_max=replays_max)
    return search.run(present)


@pytest.mark.parametrize("guess", [1, 5, 60])
@pytest.mark.parametrize("wanted", [1, 2, 7, 31, 64])
def test_fewest_finds_the_threshold_in_few_steps(wanted: int, guess: int) -> None:
    asked: list[int] = []

    def reaches(count: int) -> bool:
        asked.append(count)
        return count >= wanted

    assert fewest(guess, 64, reaches) == wanted
    assert len(asked) == len(set(asked)) <= 2 * math.log2(64) + 1


def test_fewest_of_nothing_that_reaches_is_none() -> None:
    asked: list[int] = []

    def reaches(count: int) -> bool:
        asked.append(count)
        return False

    assert fewest(1, 64, reaches) is None
    assert asked[-1] == 64
    assert len(asked) <= 8


def test_pairs_are_the_fewest_of_every_monotone_rule() -> None:
    """Where more of one role can make up for less of the other, within limits, as queues do."""
    rng = random.Random(5)
    for _ in range(60):
        prefill, decode, together = rng.randint(1, 9), rng.randint(1, 9), rng.randint(0, 4)
        judge = ScriptedJudge(
            lambda one, p=prefill, d=decode, t=together: (  # type: ignore[misc]
                one.prefill >= p and one.decode >= d and one.prefill + one.decode >= p + d + t
            )
        )
        guess = (rng.uniform(0.1, 12), rng.uniform(0.1, 12))
        outcome = searched(judge, guess, Shape.PAIRS)
        assert outcome.best is not None
        assert outcome.best.counts.total == prefill + decode + together
        assert outcome.is_complete
        assert len(judge.asked) <= 40
        assert len(judge.asked) == len(set(judge.asked))


def test_a_shape_with_fewer_workers_is_chosen() -> None:
    def needed(aggregated: int) -> ScriptedJudge:
        return ScriptedJudge(lambda one: (one.prefill >= 3 and one.decode >= 2) or one.aggregated >= aggregated)

    assert [searched(needed(count)).best.counts for count in (4, 6)] == [  # type: ignore[union-attr]
        Counts(aggregated=4),
        Counts(3, 2),
    ]
    alone = searched(needed(6), shape=Shape.AGGREGATED).best
    assert alone is not None
    assert alone.counts == Counts(aggregated=6)


def test_a_mixed_fleet_is_found_where_it_is_smaller() -> None:
    def reaches(one: Counts) -> bool:
        mixed = one.aggregated and one.prefill >= 2 and one.decode >= 2
        return bool(mixed) or one.aggregated >= 9 or (one.prefill >= 5 and one.decode >= 3)

    best = searched(ScriptedJudge(reaches), (3, 2)).best
    assert best is not None
    assert best.counts == Counts(2, 2, 1)


def test_every_fleet_of_one_worker_fewer_misses_and_is_reported() -> None:
    outcome = searched(ScriptedJudge(lambda one: one.prefill >= 3 and one.decode >= 2), shape=Shape.PAIRS)
    assert outcome.best is not None
    assert outcome.best.counts == Counts(3, 2)
    assert [one.counts for one in outcome.smaller][:2] == [Counts(2, 2), Counts(3, 1)]
    assert not any(one.reaches for one in outcome.smaller)


def test_a_fleet_that_misses_with_another_seed_is_not_the_plan() -> None:
    judge = ScriptedJudge(lambda one: one.aggregated >= 3, {1: {Counts(aggregated=3)}})
    outcome = searched(judge, shape=Shape.AGGREGATED)
    assert outcome.best is not None
    assert outcome.best.counts == Counts(aggregated=4)
    assert outcome.confirmation is not None
    assert (outcome.confirmation.seed, outcome.confirmation.reaches) == (1, True)
    assert (Counts(aggregated=3), 1) in judge.asked


def test_nothing_reaches_within_the_largest_fleet() -> None:
    judge = ScriptedJudge(lambda one: one.total > 8)
    outcome = searched(judge, workers_max=8, shape=Shape.AGGREGATED)
    assert outcome.best is None
    assert outcome.is_complete
    assert max(counts.total for counts, _ in judge.asked) == 8


@pytest.mark.parametrize("bound", [1, 3, 9])
def test_replays_are_bounded(bound: int) -> None:
    judge = ScriptedJudge(lambda one: one.prefill >= 20 and one.decode >= 11)
    outcome = searched(judge, replays_max=bound)
    assert len(judge.asked) == bound == len(outcome.tried)
    assert not outcome.is_complete


def test_the_present_fleet_is_replayed_first() -> None:
    judge = ScriptedJudge(lambda one: one.aggregated >= 2)
    outcome = searched(judge, present=Counts(aggregated=7), shape=Shape.AGGREGATED)
    assert judge.asked[0] == (Counts(aggregated=7), 0)
    assert outcome.best is not None
    assert outcome.best.counts == Counts(aggregated=2)


def test_smaller_fleets_can_serve() -> None:
    for numbers in itertools.product(range(3), repeat=3):
        counts = Counts(*numbers)
        if counts.is_possible:
            for one in counts.smaller():
                assert one.is_possible
                assert one.total == counts.total - 1
    assert list(Counts(1, 1).smaller()) == []
    assert str(Counts(1, 2, 3)) == "1 prefill + 2 decode + 3 aggregated"
