"""The message of a response and its events, in the order of Anthropic's Messages API."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic_core import from_json

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import ParserFailed
from tandem_frontend.anthropic.error_object import error_event
from tandem_frontend.openai.blocks import Block, BlockChoice


class MessageOutput(BlockChoice):
    """One message while it is generated."""

    def __init__(
        self,
        model: str,
        max_tokens: int,
        count_tokens: Callable[[str], Awaitable[int]],
        request: pb.GenerateRequest,
        *arguments: Any,
        hides_thinking: bool,
        **options: Any,
    ) -> None:
        """`max_tokens`: of the client. `count_tokens` counts those of a text. The rest: see `BlockChoice`."""
        super().__init__(request, *arguments, **options)
        self._max_tokens = max_tokens
        self._count_tokens = count_tokens
        self._hides_thinking = hides_thinking
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # Which of them were in a cache is known at the end.
            "usage": _usage(len(request.token_ids.ids), 0, 0),
        }

    def as_json(self) -> dict[str, Any]:
        """See `BlockChoice`.

        Raises:
            ParserFailed: a call's arguments are no JSON object, which the API has no form for.
        """
        return {**self._message, "content": [self._content(block, whole=True) for block in self.blocks]}

    def failed(self, problem: Exception) -> list[dict[str, Any]]:
        """See `BlockChoice`."""
        return [error_event(problem)]

    def _started(self) -> list[dict[str, Any]]:
        return [{"type": "message_start", "message": dict(self._message)}]

    def _opened(self, block: Block) -> list[dict[str, Any]]:
        content = self._content(block, whole=False)
        return [{"type": "content_block_start", "index": block.index, "content_block": content}]

    def _added(self, block: Block, text: str, logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        match block.kind:
            case "call":
                delta = {"type": "input_json_delta", "partial_json": text}
            case "text":
                delta = {"type": "text_delta", "text": text}
            case _ if self._hides_thinking:
                return []
            case _:
                delta = {"type": "thinking_delta", "thinking": text}
        return [{"type": "content_block_delta", "index": block.index, "delta": delta}]

    def _closed(self, block: Block, *, cut_off: bool) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": block.index}]

    async def _finished(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        reason, sequence = self._stop(finish)
        usage = _usage(finish.usage.prompt_tokens, finish.usage.cached_tokens, finish.usage.completion_tokens)
        thinking = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        # Counted from the text, without the marks around it.
        usage["output_tokens_details"] = {"thinking_tokens": await self._count_tokens(thinking) if thinking else 0}
        self._message |= {"stop_reason": reason, "stop_sequence": sequence, "usage": usage}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def _stop(self, finish: pb.GenerateFinish) -> tuple[str, str | None]:
        """`stop_reason` and `stop_sequence`."""
        if finish.reason == generation_pb2.FINISH_REASON_LENGTH:
            at_own_limit = finish.usage.completion_tokens >= self._max_tokens
            return "max_tokens" if at_own_limit else "model_context_window_exceeded", None
        if self.has_calls:
            return "tool_use", None
        if finish.matched_stop.WhichOneof("match") == "stop":
            return "stop_sequence", finish.matched_stop.stop
        return "end_turn", None

    def _content(self, block: Block, *, whole: bool) -> dict[str, Any]:
        """A content block: with its text, or empty as at its start."""
        text = block.text if whole else ""
        match block.kind:
            case "call":
                return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(text)}
            case "reasoning":
                # Nothing here signs it, and none is needed to send it back.
                return {"type": "thinking", "thinking": "" if self._hides_thinking else text, "signature": ""}
            case _:
                return {"type": "text", "text": text}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; as far as they go where the token limit cut them off."""
    if not text:
        return {}
    try:
        arguments = from_json(text, allow_partial=True)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ParserFailed("the model called a tool with arguments that are no JSON object")
    return arguments


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Anthropic's usage: `input_tokens` are those that no cache had."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }
