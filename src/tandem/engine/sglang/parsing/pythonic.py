"""The second stage of a stream for Llama 4's format: a list of calls in Python's syntax, `[tool(argument=1)]`.

In place of SGLang's detector, whose regular expression takes exponential time, which refuses negative numbers and holds
back all content behind an open bracket. Text is held only while it can be such a list.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool

from tandem.engine.sglang.parsing.tool_text import Delta

_BEGIN = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(|\Z)|\Z)")
"""The beginning of a list of calls, or of what may become one."""
_MARKERS = ("<|python_start|>", "<|python_end|>")
_OPENERS, _CLOSERS = "([{", ")]}"


class PythonicCalls:
    """Parses one stream's content and calls."""

    def __init__(self, tools: Sequence[Tool], mint_id: Callable[[str, int], str]) -> None:
        self._known = frozenset(tool.function.name for tool in tools)
        self._mint_id = mint_id
        self._held: list[str] = []
        """Characters from a bracket on that may be a list of calls; empty outside of one."""
        self._is_call = False
        """Whether they begin like a call, up to its bracket."""
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._blank = ""
        self._call_count = 0
        self.is_clear = False

    def push(self, piece: str) -> list[Delta]:
        """Parse the next piece; returns the deltas that are final now."""
        if piece in _MARKERS:
            return []
        deltas: list[Delta] = []
        for char in piece if self._held or "[" in piece else (piece,):
            deltas += self._take(char)
        self.is_clear = not self._held and not self._blank
        return deltas

    def finish(self, *, complete: bool) -> list[Delta]:
        """The rest: text without a complete list is content."""
        held = self._release()
        deltas = self._content(held) if held else []
        if self._blank and not self._call_count:
            deltas.append(["c", self._blank])
        return deltas

    def _take(self, text: str) -> list[Delta]:
        if not self._held:
            if text != "[":
                return self._content(text)
            self._is_call, self._depth, self._quote, self._escaped = False, 0, "", False
        self._held.append(text)
        if not self._is_call:
            begin = "".join(self._held)
            if not _BEGIN.match(begin):
                return self._refuse()
            self._is_call = begin.endswith("(")
        # Only a string in three quotation marks has line breaks: an apostrophe in content begins no string.
        if text == "\n" and self._quote and self._quote * 3 not in "".join(self._held):
            return self._refuse()
        self._scan(text)
        if self._depth:
            return []
        held = self._release()
        calls = _calls(held)
        return self._content(held) if calls is None else self._emitted(calls)

    def _refuse(self) -> list[Delta]:
        """The held text is content; its last bracket may begin a list itself."""
        held = self._release()
        if len(held) > 1 and held.endswith("["):
            return self._content(held[:-1]) + self._take("[")
        return self._content(held)

    def _release(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        return held

    def _scan(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quote:
            self._escaped = char == "\\"
            if char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in _OPENERS:
            self._depth += 1
        elif char in _CLOSERS:
            self._depth -= 1

    def _emitted(self, calls: list[tuple[str, str]]) -> list[Delta]:
        deltas: list[Delta] = []
        for name, arguments in calls:
            if name not in self._known:
                deltas += self._content(f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}')
                continue
            self._blank = ""
            deltas.append(["s", self._call_count, self._mint_id(name, self._call_count), name])
            deltas.append(["a", self._call_count, arguments])
            self._call_count += 1
        return deltas

    def _content(self, text: str) -> list[Delta]:
        text, self._blank = self._blank + text, ""
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return [["c", kept]] if kept else []


def _calls(text: str) -> list[tuple[str, str]] | None:
    """Name and arguments of each call of a list; None if the text is something else."""
    try:
        with warnings.catch_warnings():
            # Of escapes that Python does not know: a model writes regular expressions.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_call(node) for node in tree.elts]
    # Of nested brackets in their thousands, of NUL, of a number with thousands of digits.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    """Raises ValueError where the node is no call with literal keyword arguments."""
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call with keyword arguments")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Name(id="true" | "false" | "null" | "NaN" | "nan" | "inf" | "Infinity" as name):
            return {"true": True, "false": False}.get(name)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case _:
            value = ast.literal_eval(node)
            if value is not None and not isinstance(value, str | int | float):
                raise ValueError(f"{type(value).__name__} has no JSON")
            return value


def _key(node: ast.expr) -> str:
    value = _value(node)
    return value if isinstance(value, str) else json.dumps(value)
