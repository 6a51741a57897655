"""One stream of the parser host: text in, deltas out, independent of how the text is split.

    text -> pieces -> reasoning -> content and tool calls

Owns the order of the two parsers and the choice of each. Independent of other streams; does no I/O.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from tandem.engine.sglang.parsing import grammar, reasoning
from tandem.engine.sglang.parsing.clean_deltas import CleanDeltas
from tandem.engine.sglang.parsing.formats import WHOLE_CALL_FORMATS
from tandem.engine.sglang.parsing.pieces import Pieces
from tandem.engine.sglang.parsing.pythonic import PythonicCalls
from tandem.engine.sglang.parsing.schemas import with_plain_types
from tandem.engine.sglang.parsing.tool_text import Delta, ToolText
from tandem.engine.sglang.parsing.whole_calls import WholeCalls


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
    answers_at_once: bool = False
    """The output follows a grammar from its first token on, so that it cannot begin inside a reasoning block."""


class Formats:
    """Constructs the parsers that this host was started with."""

    def __init__(self, tool_parser: str | None, reasoning_parser: str | None, tokenizer: Any) -> None:
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self._tokenizer = tokenizer

    def tools(self, wanted: Wanted, *, plain_types: bool) -> FunctionCallParser | None:
        """A tool call parser for a request; None if the host has none. `plain_types`: see `schemas`."""
        if self.tool_parser is None:
            return None
        return FunctionCallParser(
            with_plain_types(wanted.tools) if plain_types else wanted.tools,
            self.tool_parser,
            tokenizer=self._tokenizer,
            tool_choice=wanted.tool_choice,
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
            answers_at_once=wanted.answers_at_once,
        )

    def grammar(self, wanted: Wanted) -> dict[str, str] | None:
        """See `grammar.constraint`."""
        parser, thoughts = self.tools(wanted, plain_types=False), self.reasoning(wanted)
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
        parser = self.tools(wanted, plain_types=True) if wanted.tools else None
        thoughts = self.reasoning(wanted)
        forced = bool(wanted.tools) and grammar.is_forced(wanted.tool_choice)
        if forced and not (parser is not None and grammar.thinks_first(parser) and _thinks(thoughts)):
            # The grammar starts with the call, so no reasoning can precede it.
            thoughts = None
        keeps = bool(wanted.tools) or self.reasoning_parser in reasoning.SPECIAL_TOKEN_PARSERS
        return Stream(thoughts, self._calls(parser, wanted, forced=forced), keep_special_tokens=keeps)

    def _calls(
        self, parser: FunctionCallParser | None, wanted: Wanted, *, forced: bool
    ) -> ToolText | WholeCalls | PythonicCalls | None:
        if not wanted.tools:
            return None
        mint_id = _minter(self.tool_parser, wanted.previous_calls)
        if forced and (parser is None or not parser.owns_tool_format()):
            return ToolText(None, wanted.tools, "json", mint_id)
        if parser is None or self.tool_parser is None:
            return None
        if self.tool_parser in WHOLE_CALL_FORMATS:
            return WholeCalls(parser, *WHOLE_CALL_FORMATS[self.tool_parser], mint_id)
        if self.tool_parser == "pythonic":
            return PythonicCalls(wanted.tools, mint_id)
        return ToolText(parser, wanted.tools, self.tool_parser, mint_id)


class Stream:
    """Parses one request's output."""

    def __init__(
        self,
        thoughts: ReasoningParser | None,
        calls: ToolText | WholeCalls | PythonicCalls | None,
        *,
        keep_special_tokens: bool,
    ) -> None:
        self._pieces = Pieces()
        self._thoughts = thoughts
        self._calls = calls
        self._clean = CleanDeltas()
        self.keep_special_tokens = keep_special_tokens
        self._is_clear = False
        self._draft: list[str] = []
        """Pieces from the beginning of a call inside of reasoning on; see `_take`."""

    def feed(self, text: str) -> list[Delta]:
        """Parse the next text; returns the deltas that are final now."""
        deltas = [delta for piece in self._pieces.push(text) for delta in self._take(piece)]
        # If the last piece was emitted at once, no marker is pending: a partial word can be emitted too, for latency.
        if self._is_clear and (word := self._pieces.take_word()):
            deltas += self._take(word)
        return self._clean.take(deltas)

    def close(self, *, complete: bool) -> list[Delta]:
        """End the text; returns the remaining deltas."""
        deltas = [delta for piece in self._pieces.flush() for delta in self._take(piece)]
        deltas += self._parse(self._draft)
        if self._thoughts is not None:
            thought, rest = self._thoughts.parse_stream_end()
            deltas += self._deltas(thought, rest)
        if self._calls is not None:
            deltas += self._calls.finish(complete=complete)
        clean = self._clean.take(deltas)
        return clean + self._clean.finish() if complete else clean

    def _take(self, piece: str) -> list[Delta]:
        """Parse a piece.

        A call inside of reasoning is a draft if the reasoning ends behind it, and a call if it never does: it is held
        until either is known.
        """
        detector = self._thoughts.detector if self._thoughts is not None else None
        if not self._draft and (not _thinks(self._thoughts) or piece != getattr(detector, "tool_start_token", None)):
            return self._parse((piece,))
        self._is_clear = False
        self._draft.append(piece)
        if detector is None or piece != detector.think_end_token:
            return []
        draft, self._draft = self._draft, []
        marker, detector.tool_start_token = detector.tool_start_token, None
        deltas = self._parse(draft)
        detector.tool_start_token = marker
        return deltas

    def _parse(self, pieces: Iterable[str]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            if self._thoughts is None:
                deltas += self._deltas(None, piece)
                continue
            thought, rest = self._thoughts.parse_stream_chunk(piece)
            deltas += self._deltas(thought, rest)
            if not rest:
                self._is_clear = bool(thought) and thought.endswith(piece)
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
