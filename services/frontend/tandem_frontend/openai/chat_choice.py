"""One choice of a chat completion: chunks of a generation become deltas of a message, and the whole message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.output_parsers import Content, Delta, ParsedStream, Reasoning, ToolCallArguments, ToolCallStart
from tandem_frontend.openai.logprobs import TokenTexts, VisibleTokens, chat_logprobs
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
        """`parsed` separates tool calls and reasoning from text; None: all output is text."""
        self._index = index
        self._texts = texts
        self._parsed = parsed
        self._one_call_only = one_call_only
        self._visible = VisibleTokens(request, texts) if request.HasField("logprobs") else None
        self._pending_logprobs: list[generation_pb2.TokenLogprob] = []
        """Log probabilities of tokens whose text has not been sent yet."""
        self._logprobs: list[generation_pb2.TokenLogprob] = []
        self._message = _Message()
        self._has_begun = False
        self._reason: str | None = None

    @property
    def parses(self) -> bool:
        """Whether text goes through a parser, another process: chunks then go to `parse`, not to `take`."""
        return self._parsed is not None

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The deltas of a chunk without a parser; empty while there is no text to send."""
        self._note_logprobs(chunk)
        return self._entries((Content(chunk.text),) if chunk.text else ())

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The deltas of a chunk; empty while the parser holds its text back.

        Raises:
            ParserFailed: the output could not be parsed.
        """
        assert self._parsed is not None, "parse() without a parser"
        self._note_logprobs(chunk)
        return self._entries(await self._parsed.feed(chunk.text))

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The deltas of the text that was held back, and the entry with the finish reason."""
        rest: Sequence[Delta] = ()
        if self._parsed is not None:
            # A call that max_tokens cut off stays incomplete: completing it would invent arguments.
            rest = await self._parsed.close(complete=finish.reason != generation_pb2.FINISH_REASON_LENGTH)
        entries = self._entries(rest)
        if self._visible is not None:
            self._pending_logprobs += self._visible.end(finish)
        # Log probabilities of tokens without text would be lost with no delta to carry them.
        if self._pending_logprobs:
            entries += self._entries((Content(""),))
        elif not self._has_begun:
            entries += self._role_entry()
        self._reason = finish_reason(finish, called_tools=bool(self._message.calls))
        return [*entries, self._entry({})]

    def as_json(self) -> dict[str, Any]:
        """The entry of `choices` in a response that is not streamed; complete after `end`."""
        visible = self._visible
        logprobs = None if visible is None else chat_logprobs(self._logprobs, self._texts, visible.cut)
        return {
            "index": self._index,
            "message": self._message.as_json(),
            "logprobs": logprobs,
            "finish_reason": self._reason,
        }

    def _note_logprobs(self, chunk: pb.GenerateChunk) -> None:
        if self._visible is not None:
            self._pending_logprobs += self._visible.take(chunk)

    def _entries(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        added = [self._message.add(delta) for delta in deltas if not self._is_dropped(delta)]
        if not added:
            return []
        entries = self._role_entry() + [self._entry(delta) for delta in added]
        if self._pending_logprobs:
            # On the first delta of the chunk, so that a client never waits for them longer than for their text.
            entries[-len(added)]["logprobs"] = self._shown(self._pending_logprobs)
            self._logprobs += self._pending_logprobs
            self._pending_logprobs = []
        return entries

    def _shown(self, logprobs: Sequence[generation_pb2.TokenLogprob]) -> dict[str, Any]:
        """In the format of a delta. What a stop string has cut is the last of all."""
        return chat_logprobs(logprobs, self._texts, None if self._visible is None else self._visible.cut)

    def _is_dropped(self, delta: Delta) -> bool:
        """Whether it belongs to a second tool call although the client allows one."""
        return self._one_call_only and isinstance(delta, ToolCallStart | ToolCallArguments) and delta.index > 0

    def _role_entry(self) -> list[dict[str, Any]]:
        """The delta with the role, once, before all others."""
        if self._has_begun:
            return []
        self._has_begun = True
        return [self._entry({"role": "assistant", "content": "", "refusal": None})]

    def _entry(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": self._reason}


class _Message:
    """The message, accumulated from its deltas."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: Delta) -> dict[str, Any]:
        """Add a delta, and return it as a streamed response contains it."""
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

    def as_json(self) -> dict[str, Any]:
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
