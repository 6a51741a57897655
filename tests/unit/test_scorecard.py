"""The arithmetic of the scorecard: pauses, and which streams are right."""

from __future__ import annotations

import pytest

from benchmarks.scorecard.fleet import Stream
from benchmarks.scorecard.scenarios import SCENARIOS
from tandem.errors import LegFailed


def test_it_has_sixteen_scenarios_of_different_names() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS) == 16


@pytest.mark.parametrize(
    ("times_s", "since_s", "pause_s"),
    [
        ([1.0, 1.1, 3.1, 3.2], 1.1, 2.0),
        ([1.0, 1.1, 3.1, 3.2], 2.0, 1.1),
        ([1.0, 5.0, 5.1], 5.0, 0.1),
        ([4.0], 1.0, 3.0),
        ([], 1.0, 0.0),
    ],
)
def test_a_pause_is_counted_from_the_fault(times_s: list[float], since_s: float, pause_s: float) -> None:
    assert Stream(begin_s=0.0, times_s=times_s).longest_pause_s(since_s) == pytest.approx(pause_s)


def test_a_stream_is_right_with_exactly_its_tokens_and_no_error() -> None:
    assert Stream(token_ids=[1, 2], expected=[1, 2]).is_right
    assert not Stream(token_ids=[1], expected=[1, 2]).is_right
    assert not Stream(token_ids=[1, 2], expected=[1, 2], problem=LegFailed("x")).is_right
