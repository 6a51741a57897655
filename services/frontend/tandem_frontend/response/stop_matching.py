"""Stop strings across chunk borders, and stop tokens: decides when a generation is over for the client.

Owns the text that is held back because it may be the beginning of a stop string. Aborts no leg.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class StopStep(NamedTuple):
    """Result of one piece of text."""

    text: str
    """Text for the client, which contains nothing of a stop string."""
    matched: str | None = None
    """The stop string that ended the generation, if any."""


class StopMatcher:
    """Searches a stream of text for the first stop string.

    The first one to be complete counts and, of several that are complete at the same character, the longest; so the
    result does not depend on where the stream is cut. One pass over the text per stop string, however repetitive it is;
    text in which none begins is skipped at the speed of a search for its first character.
    """

    __slots__ = ("_first_chars", "_held", "_searches", "has_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every generation at once"
        # Longest first: of two that end together, the one that starts earlier must be found first.
        self._searches = [_Search(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.has_stops = bool(stops)
        """Whether there is anything to search for. If not, `push` returns its text unchanged and holds nothing."""

    def push(self, text: str, *, may_end: bool = True) -> StopStep:
        """Search the next piece. Must not be called after a match.

        Args:
            text: the piece.
            may_end: if False, a stop string that becomes complete in this piece is ordinary text.
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
    """The state of the search for one stop string (Knuth, Morris, Pratt)."""

    __slots__ = ("_fallbacks", "matched_chars", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched_chars = 0
        """Length of the stop string's beginning that the text ends with."""
        self._fallbacks = _fallbacks(stop)

    def advance(self, text: str, end_chars: int, *, may_end: bool) -> int | None:
        """Characters of the text up to the end of the first occurrence, if that is before `end_chars`.

        Without `may_end` an occurrence is skipped. Must not be called after an occurrence was found.
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
    """The tokens that end a generation.

    Engines stop at them too, with one exception: SGLang ignores a request's own stop tokens together with ignore_eos.
    """

    def __init__(
        self, requested: Collection[int], end_of_sequence: Collection[int], min_tokens: int, *, ignore_eos: bool
    ) -> None:
        self._token_ids = frozenset(requested)
        if not ignore_eos:
            self._token_ids |= frozenset(end_of_sequence)
        self._min_tokens = min_tokens
        self.engine_stops_too = not ignore_eos
        """Whether the engine finishes by itself; its finish with usage and timings is then worth waiting for."""

    def has_one_of(self, token_ids: Sequence[int]) -> bool:
        """Whether one of the tokens would end a generation that is long enough."""
        return not self._token_ids.isdisjoint(token_ids)

    def matches(self, token_id: int, number: int) -> bool:
        """Whether a token ends the generation; `number` counts tokens from 1."""
        return token_id in self._token_ids and self.may_end(number)

    def may_end(self, number: int) -> bool:
        """Whether any stop may end the generation at a token; `number` counts tokens from 1."""
        return number > self._min_tokens


def _fallbacks(stop: str) -> list[int]:
    """For each length matched, the longest shorter one that is matched then too (Knuth, Morris, Pratt)."""
    fallbacks = [0] * len(stop)
    matched = 0
    for end in range(1, len(stop)):
        while matched and stop[matched] != stop[end]:
            matched = fallbacks[matched - 1]
        matched += stop[matched] == stop[end]
        fallbacks[end] = matched
    return fallbacks
