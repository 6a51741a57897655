"""POST /v1/chat/completions: messages to a message, with tool calls and reasoning where a parser is configured."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest
from tandem.output_parsers import ParsedStream, Parsers
from tandem.rpc.convert import guided_to_proto
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.chat_choice import ChatChoice
from tandem_frontend.openai.handler import Answer, EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.messages import for_template, without_control
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.openai.schemas import ChatRequest, NamedToolChoice
from tandem_frontend.openai.translation import chat_request, for_choice
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import BLOCKING_CHARS_MAX
from tandem_frontend.preparation.validation import check_text, check_token_count
from tandem_frontend.response.writers import Call

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class ChatCompletions:
    """The call."""

    def __init__(self, door: EndpointHandler, model: ServedModel, texts: TokenTexts, parsers: Parsers | None) -> None:
        """`parsers` is None where neither tool calls nor reasoning are told apart from text."""
        self._door = door
        self._model = model
        self._texts = texts
        self._parsers = parsers

    async def answer(self, wanted: ChatRequest, body_bytes: int, caller: Caller, call: Call) -> None:
        """Answer a request into its call. `body_bytes` is how long the request was.

        Raises:
            TandemError: its field is the contract's, or the parameter's own.
        """
        self._model.check_name(wanted.model)
        if wanted.choice_count > self._door.choices_max:
            raise InvalidRequest("n", f"must be at most {self._door.choices_max} here")
        request = chat_request(wanted)
        tools = self._tools(wanted)
        kwargs = self._template_kwargs(wanted)
        check_token_count("messages", len(wanted.messages), self._model.tokenizer, what="messages")
        if body_bytes <= BLOCKING_CHARS_MAX:
            prompt = self._prompt(wanted, tools, kwargs)
        else:
            # Cleaning and rendering go over everything a client sent; others are served meanwhile.
            prompt = await asyncio.to_thread(self._prompt, wanted, tools, kwargs)
        token_ids = await self._model.tokenizer.encode(prompt, add_special_tokens=False, field="messages")
        await self._constrain(request, wanted, tools, prompt, kwargs)
        async with contextlib.AsyncExitStack() as stack:
            choices = []
            for number in range(wanted.choice_count):
                parsed = await self._parsed(wanted, tools, prompt, kwargs)
                if parsed is not None:
                    await stack.enter_async_context(parsed)
                    request.skip_special_tokens = not parsed.keep_special_tokens
                one_call = wanted.parallel_tool_calls is False
                choices.append(ChatChoice(number, request, self._texts, parsed, one_call_only=one_call))
            requests = [for_choice(request, token_ids, number) for number in range(wanted.choice_count)]
            head = self._door.head(
                f"chatcmpl-{uuid.uuid4().hex}", "chat.completion.chunk" if wanted.stream else "chat.completion"
            )
            answer = Answer(head, choices, UsageSum(wanted.choice_count))
            await self._door.run(requests, answer, caller, wanted, call)

    def _prompt(self, wanted: ChatRequest, tools: Sequence[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        """The messages as the model reads them."""
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise InvalidRequest("messages", "this model has no chat template; use /v1/completions")
        messages = for_template(wanted.messages, tokenizer.without_control)
        for number, message in enumerate(messages):
            check_text(f"messages[{number}].content", message["content"], tokenizer)
        text = tokenizer.chat_template.render(messages, add_generation_prompt=True, tools=tools or None, **kwargs)
        check_text("messages", text, tokenizer)
        return text

    def _tools(self, wanted: ChatRequest) -> list[dict[str, Any]]:
        """The tools the model is told of."""
        if not wanted.tools:
            if wanted.tool_choice not in (None, "none"):
                raise InvalidRequest("tool_choice", "needs tools")
            return []
        if wanted.tool_choice == "none":
            return []
        template = self._model.tokenizer.chat_template
        if template is None or not template.takes_tools:
            raise InvalidRequest("tools", "this model's chat template takes none")
        if self._parsers is None or self._parsers.tool_parser is None:
            raise InvalidRequest("tools", "this frontend was started without a tool parser (--tool-parser)")
        tools = [tool.model_dump(exclude_none=True) for tool in wanted.tools]
        if isinstance(wanted.tool_choice, NamedToolChoice):
            name = wanted.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise InvalidRequest("tool_choice", f"names {name[:64]!r}, which is none of the tools")
        cleaned: list[dict[str, Any]] = without_control(tools, self._model.tokenizer.without_control)
        return cleaned

    def _template_kwargs(self, wanted: ChatRequest) -> dict[str, Any]:
        template = self._model.tokenizer.chat_template
        kwargs = dict(wanted.chat_template_kwargs or {})
        if wanted.reasoning_effort is not None:
            if template is None or not template.takes("reasoning_effort"):
                raise InvalidRequest("reasoning_effort", "this model's chat template takes none")
            kwargs["reasoning_effort"] = wanted.reasoning_effort
        for name in kwargs:
            if template is None or not template.takes(name):
                raise InvalidRequest("chat_template_kwargs", f"this model's chat template does not take {name[:64]!r}")
        cleaned: dict[str, Any] = without_control(kwargs, self._model.tokenizer.without_control)
        return cleaned

    async def _constrain(
        self,
        request: pb.GenerateRequest,
        wanted: ChatRequest,
        tools: Sequence[dict[str, Any]],
        prompt: str,
        kwargs: dict[str, Any],
    ) -> None:
        """The grammar of the calls, where a call must be made or must follow its schema."""
        if not tools or self._parsers is None:
            return
        choice = _choice(wanted)
        guided = await self._parsers.constraint(
            tools if choice == "auto" else [_strict(tool) for tool in tools],
            choice,
            parallel_tool_calls=wanted.parallel_tool_calls is not False,
            prompt=prompt,
            template_kwargs=kwargs,
        )
        if guided is None:
            return
        if request.HasField("guided"):
            raise InvalidRequest("tools", "that must follow a schema cannot be combined with another grammar")
        request.guided.CopyFrom(guided_to_proto(guided))

    async def _parsed(
        self, wanted: ChatRequest, tools: Sequence[dict[str, Any]], prompt: str, kwargs: dict[str, Any]
    ) -> ParsedStream | None:
        """What tells calls and reasoning from text; None where there is nothing to tell."""
        parsers = self._parsers
        if parsers is None or not (tools or parsers.reasoning_parser):
            return None
        return await parsers.open(
            tools,
            tool_choice=_choice(wanted),
            prompt=prompt,
            template_kwargs=kwargs,
            previous_calls=sum(len(getattr(message, "tool_calls", None) or ()) for message in wanted.messages),
        )


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    """A call that must be made follows its schema in any case: a grammar without one allows arguments of any kind."""
    return {**tool, "function": {"parameters": NO_PARAMETERS, **tool["function"], "strict": True}}


def _choice(wanted: ChatRequest) -> Any:
    if isinstance(wanted.tool_choice, NamedToolChoice):
        return wanted.tool_choice.model_dump()
    return wanted.tool_choice or "auto"
