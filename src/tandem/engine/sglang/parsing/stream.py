"""One stream of the parser host: text in, deltas out, independent of how the text is split.

    text -> pieces -> reasoning -> content and tool calls

Owns the order of the two parsers and the choice of each. Independent of other streams; does no I/O.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from tandem.engine.sglang.parsing import grammar, reasoning
from tandem.engine.sglang.parsing.tool_text import Delta, ToolText
from tandem.engine.sglang.parsing.whole_calls import WholeCalls

WHOLE_CALL_FORMATS = {"mistral": "[TOOL_CALLS", "interns1": "<|action_start|> <|plugin|>"}
"""Formats whose streaming detector in SGLang loses calls -> the marker that starts the calls.

See docs/reference/openai-tools.md."""

TAG_CHARS_MAX = 160
"""Longer than the tag of any detector; a longer match is not treated as a tag."""
WORD_CHARS_MAX = 16

# Excludes comparisons and shifts in content: "a < b", "a <= b", "1<2", "x << y".
_TAG = rf"<[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}}>"
_BRACKET = r"\[/?[A-Z_]{1,20}\]"
_WORD = rf"[A-Za-z0-9_]{{1,{WORD_CHARS_MAX}}}"
_PIECE = re.compile(f"{_TAG}|{_BRACKET}|{_WORD}|.", re.DOTALL)
_UNDECIDED = re.compile(
    rf"(?:<(?:[^\s<>=\d][^<>\n]{{0,{TAG_CHARS_MAX}}})?|\[/?[A-Z_]{{0,20}}|[A-Za-z0-9_]{{1,{WORD_CHARS_MAX - 1}}})\Z"
)


class Pieces:
    """Splits one stream at positions that depend on its text only, not on how it arrives.

    The results of SGLang's detectors depend on how the text is split: most lose text when a whole call arrives at
    once, some when a marker arrives in two parts. They are written for pieces the size of tokens: tags, words,
    characters.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str]:
        """The pieces that are complete now; a piece that may still grow is held back."""
        text = self._held + text
        pieces: list[str] = []
        at = 0
        while at < len(text) and not _UNDECIDED.match(text, at):
            piece = _PIECE.match(text, at)
            assert piece is not None, "any character is a piece"
            pieces.append(piece[0])
            at = piece.end()
        self._held = text[at:]
        return pieces

    def take_word(self) -> str:
        """Release the partial word that is held back; "" if a possible tag or nothing is held."""
        if not self._held or self._held[0] in "<[":
            return ""
        word, self._held = self._held, ""
        return word

    def flush(self) -> list[str]:
        """The remaining pieces, at the end of the stream."""
        text, self._held = self._held, ""
        return _PIECE.findall(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The tools and options of the request that a stream or a grammar is for."""

    tools: list[Tool]
    """With a named tool choice, only that tool."""
    tool_choice: str | ToolChoice
    prompt: str
    template_kwargs: Mapping[str, Any]
    previous_calls: int
    parallel: bool


class Formats:
    """Constructs the parsers that this host was started with."""

    def __init__(self, tool_parser: str | None, reasoning_parser: str | None, tokenizer: Any) -> None:
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self._tokenizer = tokenizer

    def tools(self, wanted: Wanted) -> FunctionCallParser | None:
        """A tool call parser for a request; None if the host has none."""
        if self.tool_parser is None:
            return None
        return FunctionCallParser(
            wanted.tools, self.tool_parser, tokenizer=self._tokenizer, tool_choice=wanted.tool_choice
        )

    def reasoning(self, wanted: Wanted) -> ReasoningParser | None:
        """A reasoning parser for a request; None if the host has none, or the prompt has closed the reasoning."""
        if self.reasoning_parser is None:
            return None
        return reasoning.make(
            self.reasoning_parser,
            wanted.prompt,
            wanted.template_kwargs,
            self._tokenizer,
            before_tools=bool(wanted.tools),
        )

    def grammar(self, wanted: Wanted) -> dict[str, str] | None:
        """See `grammar.constraint`."""
        parser, thoughts = self.tools(wanted), self.reasoning(wanted)
        markers = (thoughts.detector.think_start_token, thoughts.detector.think_end_token) if thoughts else ()
        return grammar.constraint(
            parser,
            wanted.tools,
            wanted.tool_choice,
            parallel=wanted.parallel,
            thinks=_thinks(thoughts),
            think_tokens=markers,
        )

    def open(self, wanted: Wanted) -> Stream:
        """Open a stream for a request."""
        parser, thoughts = (self.tools(wanted) if wanted.tools else None), self.reasoning(wanted)
        forced = bool(wanted.tools) and grammar.is_forced(wanted.tool_choice)
        if forced and not (parser is not None and grammar.thinks_first(parser) and _thinks(thoughts)):
            # The grammar starts with the call, so no reasoning can precede it.
            thoughts = None
        keeps = bool(wanted.tools) or self.reasoning_parser in reasoning.SPECIAL_TOKEN_PARSERS
        return Stream(thoughts, self._calls(parser, wanted, forced=forced), keep_special_tokens=keeps)

    def _calls(
        self, parser: FunctionCallParser | None, wanted: Wanted, *, forced: bool
    ) -> ToolText | WholeCalls | None:
        if not wanted.tools:
            return None
        mint_id = _minter(self.tool_parser, wanted.previous_calls)
        if forced and (parser is None or not parser.owns_tool_format()):
            return ToolText(None, wanted.tools, "json", mint_id)
        if parser is None or self.tool_parser is None:
            return None
        marker = WHOLE_CALL_FORMATS.get(self.tool_parser)
        if marker is not None:
            return WholeCalls(parser, marker, mint_id)
        return ToolText(parser, wanted.tools, self.tool_parser, mint_id)


class Stream:
    """Parses one request's output."""

    def __init__(
        self, thoughts: ReasoningParser | None, calls: ToolText | WholeCalls | None, *, keep_special_tokens: bool
    ) -> None:
        self._pieces = Pieces()
        self._thoughts = thoughts
        self._calls = calls
        self.keep_special_tokens = keep_special_tokens
        self._is_clear = False

    def feed(self, text: str) -> list[Delta]:
        """Parse the next text; returns the deltas that are final now."""
        deltas = [delta for piece in self._pieces.push(text) for delta in self._take(piece)]
        # If the last piece was emitted at once, no marker is pending: a partial word can be emitted too, for latency.
        if self._is_clear and (word := self._pieces.take_word()):
            deltas += self._take(word)
        return _joined(deltas)

    def close(self, *, complete: bool) -> list[Delta]:
        """End the text; returns the remaining deltas."""
        deltas = [delta for piece in self._pieces.flush() for delta in self._take(piece)]
        if self._thoughts is not None:
            thought, rest = self._thoughts.parse_stream_end()
            deltas += self._deltas(thought, rest)
        if self._calls is not None:
            deltas += self._calls.finish(complete=complete)
        return _joined(deltas)

    def _take(self, piece: str) -> list[Delta]:
        if self._thoughts is None:
            return self._deltas(None, piece)
        thought, rest = self._thoughts.parse_stream_chunk(piece)
        deltas = self._deltas(thought, rest)
        if thought and not rest:
            self._is_clear = thought.endswith(piece)
        elif not rest:
            self._is_clear = False
        return deltas

    def _deltas(self, thought: str | None, rest: str | None) -> list[Delta]:
        deltas: list[Delta] = [["r", thought]] if thought else []
        if rest and self._calls is None:
            deltas.append(["c", rest])
            self._is_clear = True
        elif rest and self._calls is not None:
            deltas += self._calls.push(rest)
            self._is_clear = self._calls.is_clear
        return deltas


def _thinks(thoughts: ReasoningParser | None) -> bool:
    """Whether the output starts inside a reasoning block."""
    return thoughts is not None and bool(getattr(thoughts.detector, "_in_reasoning", False))


def _minter(tool_parser: str | None, previous_calls: int) -> Callable[[str, int], str]:
    """Makes call ids from a name and an index: random, except for models whose chat templates require a format."""
    if tool_parser == "kimi_k2":
        return lambda name, index: f"functions.{name}:{previous_calls + index}"
    if tool_parser == "kimi_k3":
        return lambda name, index: f"{name}:{previous_calls + index}"
    return lambda name, index: f"call_{uuid.uuid4().hex[:24]}"


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Merge neighbouring deltas of the same kind and index."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last is not None and delta[0] != "s" and delta[:-1] == last[:-1]:
            last[-1] += delta[-1]
        else:
            joined.append(list(delta))
    return joined
