"""The second half of a stream: content and tool calls, by SGLang's detector of the model's format.

Owns the numbering of calls, and that nothing is lost: text that a detector swallows without making a call of it (a call
that is malformed, or to a tool that does not exist) comes out as content.
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
"""["c", text], ["s", index, call id, name] or ["a", index, fragment of JSON]."""
PIECES_PER_CHARS = 64
"""Some detectors parse a call's whole text anew with each piece: the more there is, the more pieces go in at once."""
FRAMED_FORMATS = frozenset({"beam", "gpt-oss", "inkling", "kimi_k3", "muse", "response_template"})
"""Here what is swallowed is frames around channels, and not for us to tell from what is lost."""
_TAGS = re.compile(r"<[^<>]*>|\s+")
_PUNCTUATION = re.compile(r"<[^<>]*>|[\s\[\]{}(),;`]+")
_STRUCTURAL = frozenset("}]{[<>)(")


class ToolText:
    """One stream's content and calls."""

    def __init__(
        self, parser: FunctionCallParser | None, tools: list[Tool], format_name: str, mint_id: Callable[[str, int], str]
    ) -> None:
        """`parser` None: the output is a plain JSON array of calls. `mint_id`: of a call's name and index."""
        self._parser = parser
        self._json = JsonArrayParser() if parser is None else None
        self._detector = self._json if parser is None else parser.detector
        self._tools = tools
        self._framed = format_name in FRAMED_FORMATS
        self._mint_id = mint_id
        self._batch: list[str] = []
        self._pending = ""
        """What has gone in since something last came out."""
        self._blank = ""
        """White space that belongs to content only if more of it follows."""
        self._numbers: dict[int, int] = {}
        """SGLang's index of a call -> ours."""
        self._arguments: list[str] = []
        self.is_clear = False
        """Whether all that has gone in has come out as content."""

    def push(self, piece: str) -> list[Delta]:
        """Take the next piece."""
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
        """What is left. `complete`: the model ended by itself, and was not cut off."""
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
            assert self._json is not None, "one of the two reads"
            result = self._json.parse_streaming_increment(text, self._tools)
            normal, calls = result.normal_text, result.calls
        self.is_clear = not calls and bool(text) and normal.endswith(text)
        return self._account(normal, calls)

    def _end(self) -> tuple[str, Sequence[ToolCallItem]]:
        if self._parser is not None:
            text, calls = self._parser.parse_stream_end()
            return text, calls
        assert self._json is not None, "one of the two reads"
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
        """The content, and before it what the detector has swallowed on the way to it, but for markup."""
        lost = self._pending.removesuffix(normal)
        if self._framed or lost == self._pending or self._is_markup(lost):
            return normal
        return lost + normal

    def _is_markup(self, text: str) -> bool:
        """Nothing but tags; behind a call also the brackets that close it."""
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
        """A finished call without arguments has an empty object of them."""
        if not self._arguments or self._arguments[-1]:
            return []
        self._arguments[-1] = "{}"
        return [["a", len(self._arguments) - 1, "{}"]]

    def _in_call(self) -> bool:
        """Whether the last call is not finished: what is pending is a part of it."""
        if not self._arguments:
            return False
        try:
            json.loads(self._arguments[-1])
        except ValueError:
            return True
        return False

    def _unstreamed(self) -> list[Delta]:
        """The end of the last call's arguments where a detector knows it and has not said it."""
        known = getattr(self._detector, "prev_tool_call_arr", None) or []
        said = getattr(self._detector, "streamed_args_for_tool", None) or []
        last = len(known) - 1
        if not 0 <= last < len(said) or last not in self._numbers:
            return []
        arguments = known[last].get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        rest = text[len(said[last]) :] if text.startswith(said[last]) else ""
        return self._call(ToolCallItem(tool_index=last, parameters=rest)) if rest else []
