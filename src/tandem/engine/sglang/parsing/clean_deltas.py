"""The last stage of a stream: what leaves is valid UTF-8, and each call's arguments are valid JSON.

Owns no meaning: deltas keep their order and their calls.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.engine.sglang.parsing.json_text import JsonText
from tandem.engine.sglang.parsing.surrogates import without_surrogates
from tandem.engine.sglang.parsing.tool_text import Delta


class CleanDeltas:
    """Cleans one stream's deltas."""

    def __init__(self) -> None:
        self._arguments: dict[int, JsonText] = {}
        """By the number of the call."""

    def take(self, deltas: Iterable[Delta]) -> list[Delta]:
        """The deltas as they can be sent; neighbours of one kind and index are merged."""
        clean: list[Delta] = []
        for kind, *values in deltas:
            if kind == "a":
                number, text = values
                _add(clean, ["a", number, self._arguments.setdefault(number, JsonText()).push(text)])
            else:
                _add(clean, [kind, *(without_surrogates(v) if isinstance(v, str) else v for v in values)])
        return clean

    def finish(self) -> list[Delta]:
        """The rest of the arguments."""
        return [["a", number, rest] for number, text in self._arguments.items() if (rest := text.finish())]


def _add(deltas: list[Delta], delta: Delta) -> None:
    if delta[-1] == "":
        return
    last = deltas[-1] if deltas else None
    if last is not None and delta[0] != "s" and delta[:-1] == last[:-1]:
        last[-1] += delta[-1]
    else:
        deltas.append(delta)
