"""Stop strings under every cutting of the stream, against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.response.stop_matching import StopMatcher, StopTokens

LETTERS = st.text("abé", max_size=24)
STOPS = st.lists(st.text("abé", min_size=1, max_size=5), max_size=4)


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first end wins; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        step = matcher.push(piece)
        out += step.text
        if step.matched is not None:
            return out, step.matched
    return out + matcher.flush(), None


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_the_cutting_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == oracle("".join(pieces), stops)


@given(st.lists(LETTERS, max_size=8), STOPS, st.integers(0, 8))
def test_a_stop_counts_where_it_is_complete(pieces: list[str], stops: list[str], first: int) -> None:
    """Before piece number `first` a stop is text; one that began there and ends later counts as a whole."""
    early, text = len("".join(pieces[:first])), "".join(pieces)
    expected: tuple[str, str | None] = text, None
    for end in range(early + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            expected = text[: end - len(max(ending, key=len))], max(ending, key=len)
            break
    matcher, out = StopMatcher(stops), ""
    for number, piece in enumerate(pieces):
        step = matcher.push(piece, may_end=number >= first)
        out += step.text
        if step.matched is not None:
            assert (out, step.matched) == expected
            return
    assert (out + matcher.flush(), None) == expected


@given(LETTERS, STOPS)
def test_held_text_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    step = matcher.push(text)
    held = matcher.flush()
    if step.matched is None:
        assert step.text + held == text
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["The en", "d. More"], ["end."], ("The ", "end.")),
        (["aab", "aac"], ["aac"], ("aab", "aac")),
        (["xabcde"], ["abcde", "bcd"], ("xa", "bcd")),
        (["xabcd"], ["bcd", "abcd"], ("x", "abcd")),
        (["\n", "\n"], ["\n\n"], ("", "\n\n")),
        (["👩‍", "👩‍👧"], ["👧"], ("👩‍👩‍", "👧")),
    ],
)
def test_cases(pieces: list[str], stops: list[str], expected: tuple[str, str]) -> None:
    assert run(pieces, stops) == expected


def test_a_long_stop_of_one_letter_is_one_pass() -> None:
    matcher = StopMatcher(["a" * 1023 + "b"])
    steps = [matcher.push("a") for _ in range(5000)]
    assert sum(len(step.text) for step in steps) == 5000 - 1023
    assert matcher.push("b").matched == "a" * 1023 + "b"


@given(st.lists(LETTERS, max_size=8))
def test_without_stops_everything_passes_at_once(pieces: list[str]) -> None:
    matcher = StopMatcher([])
    assert not matcher.has_stops
    assert [matcher.push(piece) for piece in pieces] == [(piece, None) for piece in pieces]
    assert matcher.flush() == ""
    assert StopMatcher(["a"]).has_stops


def test_a_stop_that_did_not_count_may_begin_the_one_that_does() -> None:
    matcher = StopMatcher(["aba"])
    assert matcher.push("aba", may_end=False) == ("ab", None)
    assert matcher.push("ba") == ("", "aba")


def test_stop_tokens_wait_for_the_minimum() -> None:
    tokens = StopTokens([7], [2], 3, ignore_eos=False)
    assert [tokens.matches(7, place) for place in (1, 3, 4)] == [False, False, True]
    assert tokens.matches(2, 4)
    assert tokens.engine_stops_too


def test_ignoring_the_models_end_keeps_the_requests_own() -> None:
    tokens = StopTokens([7], [2], 0, ignore_eos=True)
    assert tokens.matches(7, 1)
    assert not tokens.matches(2, 1)
    assert not tokens.engine_stops_too
