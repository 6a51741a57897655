"""Stop strings across chunk borders, and stop tokens: when a generation is over for the client.

Owns the text that is held back because a stop string may have begun in it. Ends no leg.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class StopStep(NamedTuple):
    """What became certain with a piece of text."""

    text: str
    """Text for the client: nothing of a stop string is in it."""
    matched: str | None = None
    """The stop string that ended the generation, if one did."""


class StopMatcher:
    """Searches a stream of text for the first stop string.

    The first to be complete counts and, of several that are complete at the same character, the longest; so the result
    does not depend on where the stream is cut. One pass over the text for each stop string, whatever it repeats; text
    in which none begins is passed over at the speed of a search for its first character.
    """

    __slots__ = ("_first_chars", "_held", "_searches", "has_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every generation at once"
        # Longest first: of two that end together the one that starts earlier is met first.
        self._searches = [_Search(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.has_stops = bool(stops)
        """Whether there is anything to search for. Where not, `push` gives back what it gets and nothing is held."""

    def push(self, text: str, *, may_end: bool = True) -> StopStep:
        """Take the next piece. After a match, nothing more may be pushed.

        Args:
            text: the piece.
            may_end: if not, a stop string that becomes complete in this piece is text like any other.
        """
        if not self.has_stops or (not self._held and self._first_chars.isdisjoint(text)):
            return StopStep(text)
        end_chars, matched = len(text) + 1, None
        for search in self._searches:
            found = search.advance(text, end_chars, may_end=may_end)
            if found is not None:
                end_chars, matched = found, search.stop
        whole = self._held + text
        if matched is not None:
            certain = len(self._held) + end_chars - len(matched)
            self._held = ""
            return StopStep(whole[:certain], matched)
        certain = len(whole) - max(search.matched_chars for search in self._searches)
        self._held = whole[certain:]
        return StopStep(whole[:certain])

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Where a stream stands with one stop string (Knuth, Morris, Pratt)."""

    __slots__ = ("_fallbacks", "matched_chars", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched_chars = 0
        """Of its beginning, how much the text ends with."""
        self._fallbacks = _fallbacks(stop)

    def advance(self, text: str, end_chars: int, *, may_end: bool) -> int | None:
        """Characters of the text up to the end of its first occurrence, where that is before `end_chars`.

        If it may not end there, an occurrence is passed over. After one was found, the search is over.
        """
        stop, fallbacks, matched = self.stop, self._fallbacks, self.matched_chars
        at, count = 0, min(len(text), end_chars - 1)
        while at < count:
            if not matched:
                at = text.find(stop[0], at, count)
                if at < 0:
                    break
            char = text[at]
            at += 1
            while matched and stop[matched] != char:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                if may_end:
                    return at
                matched = fallbacks[matched - 1]
        self.matched_chars = matched
        return None


class StopTokens:
    """The tokens after which a generation is over.

    Engines stop at them by themselves, but for one case: SGLang forgets a request's own stop tokens when it is told to
    ignore the model's.
    """

    def __init__(
        self, requested: Collection[int], end_of_sequence: Collection[int], min_tokens: int, *, ignore_eos: bool
    ) -> None:
        self._token_ids = frozenset(requested)
        if not ignore_eos:
            self._token_ids |= frozenset(end_of_sequence)
        self._min_tokens = min_tokens
        self.engine_stops_too = not ignore_eos
        """Then its own finish is about to come, with an account that is worth waiting for."""

    def matches(self, token_id: int, place: int) -> bool:
        """Whether a token ends the generation; `place` counts tokens from 1."""
        return token_id in self._token_ids and self.may_end(place)

    def may_end(self, place: int) -> bool:
        """Whether a stop of any kind may end the generation at a token; `place` counts tokens from 1."""
        return place > self._min_tokens


def _fallbacks(stop: str) -> list[int]:
    """For each length matched, the longest shorter one that is matched then too (Knuth, Morris, Pratt)."""
    fallbacks = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = fallbacks[matched - 1]
        matched += stop[matched] == stop[place]
        fallbacks[place] = matched
    return fallbacks
