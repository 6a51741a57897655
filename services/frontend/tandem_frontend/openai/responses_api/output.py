"""The response object and its events, in the order and with the sequence numbers of OpenAI's Responses API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem_frontend.openai.blocks import Block, BlockChoice
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.response.error_body import last_event

PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}
ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)
"""Parameters that the response object repeats as they were given."""


def response_head(body: ResponsesRequest, model: str, sampling_defaults: dict[str, float]) -> dict[str, Any]:
    """The response object before anything is generated. `sampling_defaults` are the model's own."""
    given = body.model_dump(
        include={"tools", "tool_choice", "text", "reasoning", "metadata"}, by_alias=True, exclude_none=True, mode="json"
    )
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "previous_response_id": None,
        **{name: getattr(body, name) for name in ECHOED},
        "metadata": given.get("metadata", {}),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
        "service_tier": "default",
        # Whatever the request said or left out, no server here keeps it.
        "store": False,
        "temperature": _effective("temperature", body, sampling_defaults),
        "text": {"verbosity": "medium", **given.get("text", {}), "format": _format(given)},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [_tool(tool) for tool in given.get("tools", [])],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": _effective("top_p", body, sampling_defaults),
        "truncation": "disabled",
        "usage": None,
    }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if tool["type"] == "namespace" else {"strict": None, "parameters": None, **tool}


def _effective(name: str, body: ResponsesRequest, defaults: dict[str, float]) -> float:
    value = getattr(body, name)
    return defaults.get(name, 1.0) if value is None else value


def _format(given: dict[str, Any]) -> dict[str, Any]:
    form: dict[str, Any] = given.get("text", {}).get("format", {"type": "text"})
    return form


class ResponseOutput(BlockChoice):
    """One response while it is generated."""

    def __init__(
        self,
        head: dict[str, Any],
        count_tokens: Callable[[str], Awaitable[int]],
        names: Mapping[str, tuple[str, str]],
        *arguments: Any,
        **options: Any,
    ) -> None:
        """One response without output.

        Args:
            head: the response object.
            count_tokens: counts those of a text.
            names: the namespace and the name in it, by the model's name of a function of a namespace.
            arguments: see `BlockChoice`.
            options: see `BlockChoice`.
        """
        super().__init__(*arguments, **options)
        self._response = head
        self._names = names
        self._count_tokens = count_tokens
        self._items: list[dict[str, Any]] = []
        """The items as they are now, one for each block."""
        self._sequence_number = -1

    def as_json(self) -> dict[str, Any]:
        """See `BlockChoice`."""
        return self._response

    def failed(self, problem: Exception) -> list[dict[str, Any]]:
        """See `BlockChoice`. SDKs raise at the field `error` of the first event; other clients read the second."""
        error = last_event(problem)["error"]
        failed = {"code": "server_error", "message": error["message"]}
        ended = {**self._response, "status": "failed", "error": failed, "output": self._items}
        about = {"code": error["code"], "message": error["message"], "param": error["param"], "error": error}
        return [self._event("error", **about), self._event("response.failed", response=ended)]

    def _started(self) -> list[dict[str, Any]]:
        return [self._event(f"response.{name}", response=dict(self._response)) for name in ("created", "in_progress")]

    def _opened(self, block: Block) -> list[dict[str, Any]]:
        item_id = f"{PREFIXES[block.kind]}_{uuid.uuid4().hex}"
        item: dict[str, Any] = {"id": item_id, "status": "in_progress"}
        match block.kind:
            case "call":
                item |= {"type": "function_call", "call_id": block.call_id, **self._called(block), "arguments": ""}
            case "text":
                item |= {"type": "message", "role": "assistant", "content": []}
            case "reasoning":
                item |= {"type": "reasoning", "summary": [], "content": []}
        self._items.append(item)
        events = [self._event("response.output_item.added", output_index=block.index, item=item)]
        if block.kind != "call":
            events.append(self._part_event("response.content_part.added", block, part=_part(block)))
        return events

    def _added(self, block: Block, text: str, logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        match block.kind:
            case "call":
                return [self._item_event("response.function_call_arguments.delta", block, delta=text)]
            case "reasoning":
                return [self._part_event("response.reasoning_text.delta", block, delta=text)]
            case _:
                return [self._part_event("response.output_text.delta", block, delta=text, logprobs=list(logprobs))]

    def _closed(self, block: Block, *, cut_off: bool) -> list[dict[str, Any]]:
        text, status = block.text, "incomplete" if cut_off else "completed"
        item = self._items[block.index]
        if block.kind == "call":
            done = {**item, "arguments": text, "status": status}
            about = {"name": item["name"], "arguments": text}
            events = [self._item_event("response.function_call_arguments.done", block, **about)]
        else:
            part = _part(block)
            done = {**item, "content": [part], "status": status}
            name, more = (
                ("reasoning_text", {}) if block.kind == "reasoning" else ("output_text", {"logprobs": block.logprobs})
            )
            events = [
                self._part_event(f"response.{name}.done", block, text=text, **more),
                self._part_event("response.content_part.done", block, part=part),
            ]
        self._items[block.index] = done
        return [*events, self._event("response.output_item.done", output_index=block.index, item=done)]

    async def _finished(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        # OpenAI's clients read a message of a response without calls, also of an empty one.
        if not any(block.kind != "reasoning" for block in self.blocks):
            events = self._open(Block(len(self.blocks), "text"))
            events += self._close_last(cut_off=False)
        for block in self.blocks:
            # Some parsers write the rest of a call after another has begun; a stream has failed by then.
            if block.kind == "call":
                self._items[block.index]["arguments"] = block.text
        is_cut = finish.reason == generation_pb2.FINISH_REASON_LENGTH
        status = "incomplete" if is_cut else "completed"
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._items,
            "usage": await self._usage(finish.usage),
        }
        if not is_cut:
            self._response["completed_at"] = int(time.time())
        return [*events, self._event(f"response.{status}", response=self._response)]

    def _called(self, block: Block) -> dict[str, str]:
        """The client's name of a function."""
        if block.name not in self._names:
            return {"name": block.name}
        namespace, name = self._names[block.name]
        return {"name": name, "namespace": namespace}

    async def _usage(self, usage: generation_pb2.Usage) -> dict[str, Any]:
        reasoning = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            # Counted from the text, without the marks around it.
            "output_tokens_details": {"reasoning_tokens": await self._count_tokens(reasoning) if reasoning else 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _part_event(self, kind: str, block: Block, **fields: Any) -> dict[str, Any]:
        return self._item_event(kind, block, content_index=0, **fields)

    def _item_event(self, kind: str, block: Block, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._items[block.index]["id"], output_index=block.index, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number, **fields}


def _part(block: Block) -> dict[str, Any]:
    """The one content part of a message or of reasoning, as it is now."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": list(block.logprobs)}
