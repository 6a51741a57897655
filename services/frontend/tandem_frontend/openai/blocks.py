"""One generation as a sequence of blocks: reasoning, texts and tool calls, each opened, added to and closed in turn.

What the doors share whose responses are lists of such blocks (Responses, Messages). A door says how a block looks; this
module owns their order, and which text is none: white space between two blocks, and before reasoning, is in no block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import ParserFailed
from tandem.output_parsers import Content, Delta, ParsedStream, Reasoning, ToolCallArguments, ToolCallStart
from tandem_frontend.openai.logprobs import TokenTexts, VisibleTokens, chat_logprobs

Kind = Literal["reasoning", "text", "call"]


class Block:
    """One block of a response."""

    def __init__(self, index: int, kind: Kind, *, call_id: str = "", name: str = "") -> None:
        self.index = index
        """From 0, over all kinds."""
        self.kind = kind
        self.call_id = call_id
        self.name = name
        self.logprobs: list[dict[str, Any]] = []
        """Of a text, where the request asked for them."""
        self.is_closed = False
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text, or the JSON of a call's arguments, so far."""
        return "".join(self._pieces)

    def add(self, text: str) -> None:
        """Append to the text."""
        self._pieces.append(text)


class BlockChoice(ABC):
    """A `handler.Choice` whose entries are the events of a door."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        texts: TokenTexts,
        parsed: ParsedStream | None,
        *,
        one_call_only: bool,
        streams: bool,
    ) -> None:
        """`parsed` separates tool calls and reasoning from text; None: all output is text."""
        self.blocks: list[Block] = []
        self._texts = texts
        self._parsed = parsed
        self._one_call_only = one_call_only
        self._streams = streams
        self._visible = VisibleTokens(request, texts) if request.HasField("logprobs") else None
        self._pending_logprobs: list[generation_pb2.TokenLogprob] = []
        """Log probabilities of tokens whose text has not been sent yet."""
        self._calls: dict[int, Block] = {}
        self._blank: tuple[Kind, str] = ("text", "")
        """White space that belongs to a block only if more text of its kind follows."""
        self._has_begun = False

    @property
    def parses(self) -> bool:
        """See `handler.Choice`."""
        return self._parsed is not None

    @property
    def has_calls(self) -> bool:
        """Whether the model called a tool."""
        return bool(self._calls)

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The events of a chunk without a parser; empty while there is no text to send."""
        self._note_logprobs(chunk)
        return self._events((Content(chunk.text),) if chunk.text else ())

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The events of a chunk; empty while the parser holds its text back.

        Raises:
            ParserFailed: the output could not be parsed.
        """
        assert self._parsed is not None, "parse() without a parser"
        self._note_logprobs(chunk)
        return self._events(await self._parsed.feed(chunk.text))

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The events of the text that was held back, and the last ones of the response."""
        rest: Sequence[Delta] = ()
        cut_off = finish.reason == generation_pb2.FINISH_REASON_LENGTH
        if self._parsed is not None:
            # A call that max_tokens cut off stays incomplete: completing it would invent arguments.
            rest = await self._parsed.close(complete=not cut_off)
        if self._visible is not None:
            self._pending_logprobs += self._visible.end(finish)
        events = self._events(rest)
        kind, blank = self._blank
        # A response of white space only: it is the answer.
        if blank and kind == "text" and not any(block.kind != "reasoning" for block in self.blocks):
            events += self._write(kind, blank)
        # Log probabilities of tokens without text would be lost with no text to carry them.
        if self._pending_logprobs and self._has_open("text"):
            events += self._write("text", "")
        return [*events, *self._begin(), *self._close_last(cut_off=cut_off), *await self._finished(finish)]

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """The whole response; complete after `end`."""

    @abstractmethod
    def failed(self, problem: Exception) -> list[dict[str, Any]]:
        """The last events of a stream that has begun and failed."""

    @abstractmethod
    def _started(self) -> list[dict[str, Any]]:
        """The first events of the response."""

    @abstractmethod
    def _opened(self, block: Block) -> list[dict[str, Any]]:
        """The events of a new block, which is empty yet."""

    @abstractmethod
    def _added(self, block: Block, text: str, logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The events of more text in a block."""

    @abstractmethod
    def _closed(self, block: Block, *, cut_off: bool) -> list[dict[str, Any]]:
        """The events of a block that is complete, or where the token limit cut it off."""

    @abstractmethod
    async def _finished(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The last events of the response, after all blocks."""

    def _note_logprobs(self, chunk: pb.GenerateChunk) -> None:
        if self._visible is not None:
            self._pending_logprobs += self._visible.take(chunk)

    def _events(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    events += self._append("text", text)
                case Reasoning(text):
                    events += self._append("reasoning", text)
                case ToolCallStart(index, call_id, name) if self._allows(index):
                    block = self._calls[index] = Block(len(self.blocks), "call", call_id=call_id, name=name)
                    events += self._open(block)
                case ToolCallArguments(index, fragment) if self._allows(index):
                    events += self._argue(self._calls[index], fragment)
        # Only texts have log probabilities: those of calls and reasoning have no field to travel in.
        if deltas and not any(isinstance(delta, Content) for delta in deltas):
            self._pending_logprobs = []
        return events

    def _allows(self, call: int) -> bool:
        """Whether the client takes a call of this number."""
        return call == 0 or not self._one_call_only

    def _append(self, kind: Kind, text: str) -> list[dict[str, Any]]:
        """Add to the open block of this kind, or open one as soon as there is more than white space."""
        if not self._has_open(kind):
            blank_kind, blank = self._blank
            text = (blank if blank_kind == kind else "") + text
            if text.isspace():
                self._blank = (kind, text)
                return []
            # Models write line breaks behind their reasoning and their calls. What a response begins with is its own.
            if kind == "reasoning" or self.blocks:
                text = text.lstrip()
        return self._write(kind, text)

    def _write(self, kind: Kind, text: str) -> list[dict[str, Any]]:
        events = [] if self._has_open(kind) else self._open(Block(len(self.blocks), kind))
        block = self.blocks[-1]
        block.add(text)
        logprobs = self._take_logprobs() if kind == "text" else []
        block.logprobs += logprobs
        return events + self._added(block, text, logprobs)

    def _has_open(self, kind: Kind) -> bool:
        return bool(self.blocks) and self.blocks[-1].kind == kind and not self.blocks[-1].is_closed

    def _argue(self, block: Block, fragment: str) -> list[dict[str, Any]]:
        block.add(fragment)
        if not block.is_closed:
            return self._added(block, fragment, ())
        if self._streams:
            # Its end is on the way to the client already: the rest would be lost, and the call be called as it is.
            raise ParserFailed("the model wrote more arguments of a tool call behind the call's end")
        return []

    def _open(self, block: Block) -> list[dict[str, Any]]:
        events = [*self._begin(), *self._close_last(cut_off=False)]
        self._blank = ("text", "")
        self.blocks.append(block)
        return events + self._opened(block)

    def _close_last(self, *, cut_off: bool) -> list[dict[str, Any]]:
        if not self.blocks or self.blocks[-1].is_closed:
            return []
        self.blocks[-1].is_closed = True
        return self._closed(self.blocks[-1], cut_off=cut_off)

    def _begin(self) -> list[dict[str, Any]]:
        """The response's first events, once, with its first text: a failure before it has an HTTP status."""
        if self._has_begun:
            return []
        self._has_begun = True
        return self._started()

    def _cut(self) -> str | None:
        return None if self._visible is None else self._visible.cut

    def _take_logprobs(self) -> list[dict[str, Any]]:
        if not self._pending_logprobs:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(self._pending_logprobs, self._texts, self._cut())["content"]
        self._pending_logprobs = []
        return entries
