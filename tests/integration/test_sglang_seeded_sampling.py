"""Seeded sampling without an engine: unbiased, filtered as requested, independent of the rest of the batch."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tandem.engine.sglang.hooks.seeded_sampling import draw  # noqa: E402 -- needs torch

pytestmark = pytest.mark.engine_sglang

SAMPLES = 20_000
PROBS = [0.5, 0.25, 0.15, 0.07, 0.03]


def drawn(probs: list[list[float]], seeds: list[int], positions: list[int], *filters: list[float]) -> list[int]:
    given: Any = tuple(torch.tensor(values) for values in filters) or None
    tokens: list[int] = draw(torch.tensor(probs), torch.tensor(seeds), torch.tensor(positions), given).tolist()
    return tokens


def shares(*filters: float, over: str = "seeds") -> list[float]:
    """How often each token comes, over many seeds or many places."""
    seeds, positions = (range(SAMPLES), [7] * SAMPLES) if over == "seeds" else ([7] * SAMPLES, range(SAMPLES))
    rows = [[value] * SAMPLES for value in filters]
    tokens = drawn([PROBS] * SAMPLES, list(seeds), list(positions), *rows)
    return [tokens.count(token) / SAMPLES for token in range(len(PROBS))]


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_token_frequencies_match_their_probabilities(over: str) -> None:
    assert shares(over=over) == pytest.approx(PROBS, abs=0.015)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [((2, 1.0, 0.0), 2), ((2**30, 0.7, 0.0), 2), ((2**30, 1.0, 0.25), 3), ((4, 0.95, 0.14), 4), ((1, 1.0, 0.0), 1)],
)
def test_filters(filters: tuple[int, float, float], kept: int) -> None:
    rest = sum(PROBS[:kept])
    expected = [p / rest if place < kept else 0.0 for place, p in enumerate(PROBS)]
    assert shares(*filters) == pytest.approx(expected, abs=0.015)


def test_a_row_is_drawn_alike_alone_in_company_and_with_filters_that_do_nothing() -> None:
    rows, seeds, positions = [PROBS] * 50, list(range(-25, 25)), list(range(50))
    together = drawn(rows, seeds, positions)
    assert [drawn([PROBS], [s], [p])[0] for s, p in zip(seeds, positions, strict=True)] == together
    assert drawn(rows, seeds, positions, [2**30] * 50, [1.0] * 50, [0.0] * 50) == together
    assert drawn(rows[::-1], seeds[::-1], positions[::-1]) == together[::-1]


def test_the_ends_of_the_range_of_seeds() -> None:
    assert len(drawn([PROBS] * 3, [-(2**63), 2**63 - 1, 0], [0, 2**31, 5])) == 3


def test_a_token_that_a_grammar_forbids_is_never_drawn() -> None:
    tokens = drawn([[0.0, 0.5, 0.0, 0.5]] * SAMPLES, list(range(SAMPLES)), [0] * SAMPLES)
    assert set(tokens) == {1, 3}
