"""One answer of a chat: from chunks of a generation to deltas of a message, and to the message as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.output_parsers import Content, Delta, ParsedStream, Reasoning, ToolCallArguments, ToolCallStart
from tandem_frontend.openai.logprobs import StopFilter, TokenTexts, chat_logprobs
from tandem_frontend.openai.response import finish_reason


class ChatChoice:
    """One entry of `choices`."""

    def __init__(
        self,
        index: int,
        request: pb.GenerateRequest,
        texts: TokenTexts,
        parsed: ParsedStream | None,
        *,
        one_call_only: bool = False,
    ) -> None:
        """`parsed` tells tool calls and reasoning from text; None: all is text."""
        self._index = index
        self._texts = texts
        self._parsed = parsed
        self._one_call_only = one_call_only
        self._shown = StopFilter(request, texts.eos_token_ids) if request.HasField("logprobs") else None
        self._untold: list[generation_pb2.TokenLogprob] = []
        """Log probabilities of tokens that have shown no text yet."""
        self._logprobs: list[generation_pb2.TokenLogprob] = []
        self._message = _Message()
        self._has_begun = False
        self._reason: str | None = None

    @property
    def parses(self) -> bool:
        """Whether text goes through a parser, which another process has: then `parse` takes chunks, and not `take`."""
        return self._parsed is not None

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The deltas of a chunk that is all text; none where nothing shows yet."""
        self._note_logprobs(chunk)
        return self._entries((Content(chunk.text),) if chunk.text else ())

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The deltas a chunk makes; none where nothing shows yet.

        Raises:
            ParserFailed
        """
        assert self._parsed is not None, "parse() without a parser"
        self._note_logprobs(chunk)
        return self._entries(await self._parsed.feed(chunk.text))

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """What was held back, and the entry that tells why it ended."""
        rest: Sequence[Delta] = ()
        if self._parsed is not None:
            # What the budget has cut off stays cut off: the parser must not complete it.
            rest = await self._parsed.close(complete=finish.reason != generation_pb2.FINISH_REASON_LENGTH)
        entries = self._entries(rest)
        if self._untold:
            entries += self._entries((Content(""),))
        elif not self._has_begun:
            entries += self._beginning()
        self._reason = finish_reason(finish, called_tools=bool(self._message.calls))
        return [*entries, self._entry({})]

    def told(self) -> dict[str, Any]:
        """The whole answer."""
        logprobs = None if self._shown is None else chat_logprobs(self._logprobs, self._texts)
        return {
            "index": self._index,
            "message": self._message.told(),
            "logprobs": logprobs,
            "finish_reason": self._reason,
        }

    def _note_logprobs(self, chunk: pb.GenerateChunk) -> None:
        if self._shown is not None:
            self._untold += self._shown.keep(chunk.logprobs)

    def _entries(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        told = [self._message.add(delta) for delta in deltas if not self._is_unwanted(delta)]
        if not told:
            return []
        entries = self._beginning() + [self._entry(delta) for delta in told]
        if self._untold:
            entries[-len(told)]["logprobs"] = chat_logprobs(self._untold, self._texts)
            self._logprobs += self._untold
            self._untold = []
        return entries

    def _is_unwanted(self, delta: Delta) -> bool:
        """A second call where the client takes one at most."""
        return self._one_call_only and isinstance(delta, ToolCallStart | ToolCallArguments) and delta.index > 0

    def _beginning(self) -> list[dict[str, Any]]:
        """The delta that says who speaks, before the first other one."""
        if self._has_begun:
            return []
        self._has_begun = True
        return [self._entry({"role": "assistant", "content": "", "refusal": None})]

    def _entry(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": self._reason}


class _Message:
    """The message as it grows out of its deltas."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: Delta) -> dict[str, Any]:
        """Add one, and return it as a stream tells it."""
        match delta:
            case Content(text):
                self._content.append(text)
                return {"content": text}
            case Reasoning(text):
                self._reasoning.append(text)
                return {"reasoning_content": text}
            case ToolCallStart(index, call_id, name):
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                self.calls[index] = {**call, "function": dict(call["function"])}  # type: ignore[arg-type]
                return {"tool_calls": [{"index": index, **call}]}
            case ToolCallArguments(index, fragment):
                self.calls[index]["function"]["arguments"] += fragment
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}

    def told(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self.calls:
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message
