"""The second stage of a stream for formats whose streaming detector is wrong: content is streamed, calls at the end.

`formats` lists these formats; docs/reference/openai-tools.md describes how SGLang's detectors fail on them.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.function_call.function_call_parser import FunctionCallParser

from tandem.engine.sglang.parsing.json_state import JsonState
from tandem.engine.sglang.parsing.pieces import Pieces
from tandem.engine.sglang.parsing.surrogates import EscapedHalves
from tandem.engine.sglang.parsing.tool_text import Delta
from tandem.engine.sglang.parsing.unknown_tools import UnknownCall, accept_all_names


class WholeCalls:
    """Parses one stream's content and calls."""

    def __init__(
        self, parser: FunctionCallParser, marker: str, end_marker: str, mint_id: Callable[[str, int], str]
    ) -> None:
        """`marker` starts the part of the text that contains the calls; each ends with `end_marker`, "" if unknown."""
        self._parser = parser
        self._known = frozenset(tool.function.name for tool in parser.tools)
        accept_all_names(parser.detector)
        self._marker = marker
        self._end_marker = end_marker
        self._mint_id = mint_id
        self._held = ""
        self._found = False
        self.is_clear = False

    def push(self, piece: str) -> list[Delta]:
        """Content before the marker, without white space that may directly precede the marker."""
        self._held += piece
        if self._found or self._marker in self._held:
            before, _, _ = self._held.partition(self._marker) if not self._found else ("", "", "")
            self._found = True
            self._held = self._held[len(before) :]
            return [["c", before.rstrip()]] if before.strip() else []
        kept = self._kept_chars()
        out = self._held[: len(self._held) - kept]
        self._held = self._held[len(out) :]
        self.is_clear = not self._held
        return [["c", out]] if out else []

    def finish(self, *, complete: bool) -> list[Delta]:
        """The calls, and content after them. Text without a complete call is content."""
        text, self._held = self._held, ""
        if not text:
            return []
        if not self._found:
            return [["c", text]]
        normal, calls = self._parser.parse_non_stream(_mended(text))
        if not calls:
            return [["c", text]]
        behind = text.rpartition(self._end_marker)[2].strip() if self._end_marker else ""
        if behind and behind not in normal:
            normal += "\n" + behind
        deltas: list[Delta] = []
        number = 0
        for call in calls:
            if call.name not in self._known:
                normal += "\n" + UnknownCall(0, call.name or "", call.parameters).as_text()
                continue
            deltas.append(["s", number, self._mint_id(call.name or "", number), call.name])
            deltas.append(["a", number, call.parameters or "{}"])
            number += 1
        return ([["c", normal.strip()]] if normal.strip() else []) + deltas

    def _kept_chars(self) -> int:
        """Length of the held text's end that may be the start of the marker, with the white space before it."""
        whole = len(self._held)
        partial = next(
            (n for n in range(min(whole, len(self._marker) - 1), 0, -1) if self._marker.startswith(self._held[-n:])), 0
        )
        return whole - len(self._held[: whole - partial].rstrip())


def _mended(text: str) -> str:
    """The calls' text without what their JSON parser refuses, and without tags in strings."""
    halves, state, pieces = EscapedHalves(), JsonState(), Pieces()
    mended = [halves.push(piece) for piece in pieces.push(text) + pieces.flush()] + [halves.flush()]
    return "".join(state.push(piece, inside=True)[0] for piece in mended)
