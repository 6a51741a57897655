"""The second stage of a stream: content and tool calls, with SGLang's detector for the model's format.

Owns the numbering of calls, and the guarantee that no text is lost: text that a detector consumes without producing a
call (a malformed call) is emitted as content, and so is a call to a tool that the request does not have.
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

from tandem.engine.sglang.parsing.formats import (
    CLOSERS,
    FOLLOWED_FORMATS,
    FRAMED_FORMATS,
    JSON_FORMATS,
    REFUSING_FORMATS,
    TAGS,
)
from tandem.engine.sglang.parsing.json_state import JsonState
from tandem.engine.sglang.parsing.plain_text import BareObjects
from tandem.engine.sglang.parsing.surrogates import EscapedHalves
from tandem.engine.sglang.parsing.unknown_tools import UnknownCall, accept_all_names

Delta = list[Any]
"""["r", text], ["c", text], ["s", index, call id, name] or ["a", index, JSON fragment]; see `output_parsers.deltas`."""
PIECES_PER_CHARS = 64
"""Batching: some detectors re-parse a call's whole text on each piece, so pieces are batched as the text grows."""
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
        self._known = frozenset(tool.function.name for tool in tools)
        self._framed = format_name in FRAMED_FORMATS
        self._tags = TAGS.get(format_name, ())
        self._closer = CLOSERS.get(format_name, "")
        self._halves = EscapedHalves() if format_name in JSON_FORMATS else None
        self._bare = BareObjects(self._known) if format_name == "llama3" else None
        self._state = JsonState() if format_name in FOLLOWED_FORMATS else None
        if format_name not in REFUSING_FORMATS:
            accept_all_names(self._detector)
        self._unknown: UnknownCall | None = None
        """The call that the detector reads, if its tool is not in the request."""
        self._had_unknown = False
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
        if self._bare is None:
            return self._push(piece)
        content, rest = self._bare.push(piece)
        deltas = self._content(content) if content else []
        if not rest:
            self.is_clear = False
        return deltas + self._push(rest) if rest else deltas

    def _push(self, piece: str) -> list[Delta]:
        held_chars = self._held_chars()
        if self._halves is not None and held_chars:
            piece = self._halves.push(piece)
        if self._state is not None:
            piece, matters = self._state.push(piece, inside=bool(held_chars))
        elif self._tags and held_chars:
            matters = piece.startswith("<") and any(tag in piece for tag in self._tags)
        else:
            matters = bool(_STRUCTURAL.intersection(piece))
        if piece:
            self._batch.append(piece)
        if not matters and len(self._batch) * PIECES_PER_CHARS <= held_chars:
            return []
        text, rest = ("".join(self._batch[:-1]), piece) if matters else ("".join(self._batch), "")
        self._batch.clear()
        return [delta for part in (text, rest) if part for delta in self._feed(part)]

    def _held_chars(self) -> int:
        """Length of the call's text that the detector holds."""
        return len(getattr(self._detector, "_buffer", "") or getattr(self._detector, "_buf", ""))

    def finish(self, *, complete: bool) -> list[Delta]:
        """End the text; returns the remaining deltas. `complete`: the model ended by itself and was not cut off."""
        held = self._bare.flush() if self._bare is not None else ""
        if self._halves is not None:
            self._batch.append(self._halves.flush())
        deltas = self._feed(rest) if (rest := "".join(self._batch)) else []
        self._batch.clear()
        while more := self._feed(""):
            deltas += more
        deltas += self._account(*self._end())
        deltas += self._end_unknown()
        if self._pending and not self._framed and not self._is_markup(self._pending) and not self._in_call():
            deltas += self._content(self._pending)
        deltas += self._content(held) if held else []
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
        deltas: list[Delta] = []
        if normal:
            if normal.strip():
                deltas += self._end_unknown()
            deltas += self._content(self._with_lost(normal))
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
        if self._closer and (self._arguments or self._had_unknown):
            text = text.replace(self._closer, "")
            if not text.strip():
                self._blank += text
                return []
        text, self._blank = self._blank + text, ""
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return [["c", kept]]

    def _call(self, call: ToolCallItem) -> list[Delta]:
        deltas: list[Delta] = []
        if call.name:
            deltas += self._settle() + self._end_unknown()
            if call.name not in self._known:
                self._unknown, self._had_unknown = UnknownCall(call.tool_index, call.name), True
            else:
                index = self._numbers[call.tool_index] = len(self._arguments)
                self._arguments.append("")
                self._blank = ""
                deltas.append(["s", index, self._mint_id(call.name, index), call.name])
        if self._unknown is not None and call.tool_index == self._unknown.tool_index:
            self._unknown.arguments += call.parameters
            return deltas
        number = self._numbers.get(call.tool_index)
        if call.parameters and number is not None:
            self._arguments[number] += call.parameters
            deltas.append(["a", number, call.parameters])
        return deltas

    def _end_unknown(self) -> list[Delta]:
        """The call to an unknown tool, as content."""
        unknown, self._unknown = self._unknown, None
        return [] if unknown is None else self._content(unknown.as_text())

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
