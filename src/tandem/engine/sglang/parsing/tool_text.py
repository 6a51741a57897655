"""The second stage of a stream: content and tool calls, with SGLang's detector for the model's format.

Owns the numbering of calls, and the guarantee that no text is lost: text that a detector consumes without producing a
call (a malformed call, or one to an unknown tool) is emitted as content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.json_array_parser import JsonArrayParser

Delta = list[Any]
"""["r", text], ["c", text], ["s", index, call id, name] or ["a", index, JSON fragment]; see `output_parsers.deltas`."""
PIECES_PER_CHARS = 64
"""Batching: some detectors re-parse a call's whole text on each piece, so pieces are batched as the text grows."""
FRAMED_FORMATS = frozenset({"beam", "gpt-oss", "inkling", "kimi_k3", "muse", "response_template"})
"""Formats whose detectors consume channel frames, which cannot be distinguished from lost text."""
_TAGS = re.compile(r"<[^<>]*>|\s+")
_PUNCTUATION = re.compile(r"<[^<>]*>|[\s\[\]{}(),;`]+")
_STRUCTURAL = frozenset("}]{[<>)(")


class ToolText:
    """Parses one stream's content and calls."""

    def __init__(
        self, parser: FunctionCallParser | None, tools: list[Tool], format_name: str, mint_id: Callable[[str, int], str]
    ) -> None:
        """`parser` None: the output is a plain JSON array of calls. `mint_id` makes a call id from name and index."""
        self._parser = parser
        self._json = JsonArrayParser() if parser is None else None
        self._detector = self._json if parser is None else parser.detector
        self._tools = tools
        self._framed = format_name in FRAMED_FORMATS
        self._mint_id = mint_id
        self._batch: list[str] = []
        self._pending = ""
        """Text fed since the detector last produced output."""
        self._blank = ""
        """Trailing white space of the content, emitted only if more content follows."""
        self._numbers: dict[int, int] = {}
        """SGLang's index of a call -> the index that is emitted."""
        self._arguments: list[str] = []
        self.is_clear = False
        """Whether all text fed so far has been emitted as content."""

    def push(self, piece: str) -> list[Delta]:
        """Parse the next piece; returns the deltas that are final now."""
        self._batch.append(piece)
        held_chars = len(getattr(self._detector, "_buffer", ""))
        if len(self._batch) * PIECES_PER_CHARS <= held_chars and not _STRUCTURAL.intersection(piece):
            return []
        text, rest = (
            ("".join(self._batch[:-1]), piece) if _STRUCTURAL.intersection(piece) else ("".join(self._batch), "")
        )
        self._batch.clear()
        return [delta for part in (text, rest) if part for delta in self._feed(part)]

    def finish(self, *, complete: bool) -> list[Delta]:
        """End the text; returns the remaining deltas. `complete`: the model ended by itself and was not cut off."""
        deltas = self._feed("".join(self._batch)) if self._batch else []
        self._batch.clear()
        while more := self._feed(""):
            deltas += more
        deltas += self._account(*self._end())
        if self._pending and not self._framed and not self._is_markup(self._pending) and not self._in_call():
            deltas += self._content(self._pending)
        if self._blank and not self._arguments:
            deltas.append(["c", self._blank])
        if complete:
            deltas += self._unstreamed() + self._settle()
        return deltas

    def _feed(self, text: str) -> list[Delta]:
        self._pending += text
        if self._parser is not None:
            normal, calls = self._parser.parse_stream_chunk(text)
        else:
            assert self._json is not None, "either a parser or a JSON parser is set"
            result = self._json.parse_streaming_increment(text, self._tools)
            normal, calls = result.normal_text, result.calls
        self.is_clear = not calls and bool(text) and normal.endswith(text)
        return self._account(normal, calls)

    def _end(self) -> tuple[str, Sequence[ToolCallItem]]:
        if self._parser is not None:
            text, calls = self._parser.parse_stream_end()
            return text, calls
        assert self._json is not None, "either a parser or a JSON parser is set"
        result = self._json.finish(self._tools)
        return result.normal_text, result.calls

    def _account(self, normal: str, calls: Sequence[ToolCallItem]) -> list[Delta]:
        deltas = self._content(self._with_lost(normal)) if normal else []
        for call in calls:
            deltas += self._call(call)
        if deltas or calls or normal:
            self._pending = ""
        return deltas

    def _with_lost(self, normal: str) -> str:
        """The content, preceded by text that the detector consumed before it, unless that is markup only."""
        lost = self._pending.removesuffix(normal)
        if self._framed or lost == self._pending or self._is_markup(lost):
            return normal
        return lost + normal

    def _is_markup(self, text: str) -> bool:
        """Whether the text is only tags or, after a call, also closing brackets and punctuation."""
        for marker in (getattr(self._detector, "bot_token", ""), getattr(self._detector, "eot_token", "")):
            if len(marker) > 1:
                text = text.replace(marker, "")
        return not (_PUNCTUATION if self._arguments else _TAGS).sub("", text)

    def _content(self, text: str) -> list[Delta]:
        if text.isspace():
            self._blank += text
            return []
        text, self._blank = self._blank + text, ""
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return [["c", kept]]

    def _call(self, call: ToolCallItem) -> list[Delta]:
        deltas: list[Delta] = []
        if call.name:
            deltas += self._settle()
            index = self._numbers[call.tool_index] = len(self._arguments)
            self._arguments.append("")
            self._blank = ""
            deltas.append(["s", index, self._mint_id(call.name, index), call.name])
        number = self._numbers.get(call.tool_index)
        if call.parameters and number is not None:
            self._arguments[number] += call.parameters
            deltas.append(["a", number, call.parameters])
        return deltas

    def _settle(self) -> list[Delta]:
        """Emit an empty JSON object for a finished call without arguments."""
        if not self._arguments or self._arguments[-1]:
            return []
        self._arguments[-1] = "{}"
        return [["a", len(self._arguments) - 1, "{}"]]

    def _in_call(self) -> bool:
        """Whether the last call is unfinished, so that pending text belongs to it."""
        if not self._arguments:
            return False
        try:
            json.loads(self._arguments[-1])
        except ValueError:
            return True
        return False

    def _unstreamed(self) -> list[Delta]:
        """The end of the last call's arguments, if the detector has parsed but not emitted it."""
        known = getattr(self._detector, "prev_tool_call_arr", None) or []
        streamed = getattr(self._detector, "streamed_args_for_tool", None) or []
        last = len(known) - 1
        if not 0 <= last < len(streamed) or last not in self._numbers:
            return []
        arguments = known[last].get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        rest = text[len(streamed[last]) :] if text.startswith(streamed[last]) else ""
        return self._call(ToolCallItem(tool_index=last, parameters=rest)) if rest else []
