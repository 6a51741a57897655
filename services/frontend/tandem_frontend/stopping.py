"""Stop strings across chunk borders, and stop tokens: when a generation is over for the client.

Owns the text that is held back because a stop string may have begun in it. Ends no leg.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopStep:
    """What became certain with a piece of text."""

    text: str
    """Text for the client: nothing of a stop string is in it."""
    matched: str | None = None
    """The stop string that ended the generation, if one did."""


class StopMatcher:
    """Searches a stream of text for the first stop string.

    The first to be complete counts and, of several that are complete at the same character, the longest; so the result
    does not depend on where the stream is cut. One pass over the text for each stop string, whatever it repeats.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every generation at once"
        # Longest first: of two that end together the one that starts earlier is met first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched_chars = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str, *, may_end: bool = True) -> StopStep:
        """Take the next piece. After a match, nothing more may be pushed.

        Args:
            text: the piece.
            may_end: if not, a stop string that becomes complete in this piece is text like any other.
        """
        if not self._stops:
            return StopStep(text)
        whole = self._held + text
        for place, char in enumerate(text, start=len(self._held)):
            stop = self._step(char)
            if stop is not None and may_end:
                self._held = ""
                return StopStep(whole[: place + 1 - len(stop)], stop)
        certain = len(whole) - max(self._matched_chars)
        self._held = whole[certain:]
        return StopStep(whole[:certain])

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Advance every stop string by one character; the longest that is now complete."""
        complete = None
        for number, stop in enumerate(self._stops):
            matched, fallbacks = self._matched_chars[number], self._fallbacks[number]
            while matched and stop[matched] != char:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                complete = complete or stop
                matched = fallbacks[matched - 1]
            self._matched_chars[number] = matched
        return complete


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
