"""POST /v1/chat/completions: messages to a message, with tool calls and reasoning where a parser is configured."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest
from tandem.output_parsers import ParsedStream, Parsers
from tandem.rpc.convert import guided_to_proto
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.chat_choice import ChatChoice
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.messages import for_template, without_control
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.openai.schemas import ChatRequest, NamedToolChoice, TextFormat
from tandem_frontend.openai.translation import chat_request, for_choice
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import BLOCKING_CHARS_MAX
from tandem_frontend.preparation.validation import check_text, check_token_count
from tandem_frontend.response.writers import ClientCall

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat request that can be generated: for each choice its generation, and the parser of its output."""

    requests: list[pb.GenerateRequest]
    parsed: list[ParsedStream | None]
    """None: all output of that choice is text."""
    _: KW_ONLY
    has_tool_grammar: bool
    """See `handler.ApiResponse`."""


class ChatCompletions:
    """Handles POST /v1/chat/completions."""

    def __init__(
        self, handler: EndpointHandler, model: ServedModel, texts: TokenTexts, parsers: Parsers | None
    ) -> None:
        """`parsers` is None where neither a tool parser nor a reasoning parser is configured."""
        self._handler = handler
        self._model = model
        self._texts = texts
        self._parsers = parsers

    async def handle(self, body: ChatRequest, body_bytes: int, caller: Caller, call: ClientCall) -> None:
        """Run the request and send its response into `call`. `body_bytes` is the length of the request body.

        Raises:
            TandemError: its `field` is a field of the contract or an OpenAI parameter.
        """
        async with contextlib.AsyncExitStack() as stack:
            chat = await self.prepare(body, body_bytes, caller, call, stack)
            one_call = body.parallel_tool_calls is False
            choices = [
                ChatChoice(number, request, self._texts, parsed, one_call_only=one_call)
                for number, (request, parsed) in enumerate(zip(chat.requests, chat.parsed, strict=True))
            ]
            head = self._handler.head(
                f"chatcmpl-{uuid.uuid4().hex}", "chat.completion.chunk" if body.stream else "chat.completion"
            )
            usage = UsageSum(body.choice_count)
            response = ApiResponse(head, choices, usage, has_tool_grammar=chat.has_tool_grammar)
            await self._handler.run(chat.requests, response, caller, body, call)

    async def prepare(
        self, body: ChatRequest, body_bytes: int, caller: Caller, call: ClientCall, stack: contextlib.AsyncExitStack
    ) -> PreparedChat:
        """Validate, charge for, render and tokenise a request; every door that chats begins here.

        Args:
            body: as the client sent it, or translated from another door's request.
            body_bytes: length of the client's request body.
            caller: is charged for every choice.
            call: its response's headers carry the quota.
            stack: receives the parsers' streams, which must stay open until the response has ended.

        Raises:
            TandemError: its `field` is a field of the contract or an OpenAI parameter.
        """
        if body.choice_count > self._handler.choices_max:
            raise InvalidRequest("n", f"must be at most {self._handler.choices_max} on this frontend")
        request = chat_request(body)
        stack.enter_context(self._handler.charged(caller, call, body.choice_count))
        tools, kwargs = self._tools(body), self._template_kwargs(body)
        prompt, token_ids = await self._tokenised(body, body_bytes, tools, kwargs)
        has_tool_grammar = await self._constrain(request, body, tools, prompt, kwargs)
        streams: list[ParsedStream | None] = []
        for _ in range(body.choice_count):
            parsed = await self._parsed(body, tools, prompt, kwargs)
            # Some parsers recognise calls by special tokens, which detokenizing drops by default.
            if parsed is not None:
                await stack.enter_async_context(parsed)
                request.skip_special_tokens = not parsed.keep_special_tokens
            streams.append(parsed)
        requests = [for_choice(request, token_ids, number) for number in range(body.choice_count)]
        return PreparedChat(requests, streams, has_tool_grammar=has_tool_grammar)

    async def count_tokens(self, body: ChatRequest, body_bytes: int) -> int:
        """Tokens of the prompt that the request would have.

        Raises:
            TandemError: its `field` is an OpenAI parameter.
        """
        _, token_ids = await self._tokenised(body, body_bytes, self._tools(body), self._template_kwargs(body))
        return len(token_ids)

    def takes(self, name: str) -> bool:
        """Whether the model's chat template reads a variable that a request may set."""
        template = self._model.tokenizer.chat_template
        return template is not None and template.takes(name)

    @property
    def reasons(self) -> bool:
        """Whether reasoning is separated from text: a reasoning parser is configured."""
        return self._parsers is not None and self._parsers.reasoning_parser is not None

    async def _tokenised(
        self, body: ChatRequest, body_bytes: int, tools: Sequence[dict[str, Any]], kwargs: dict[str, Any]
    ) -> tuple[str, Sequence[int]]:
        """The prompt as text and as token ids."""
        check_token_count("messages", len(body.messages), self._model.tokenizer, what="messages")
        if body_bytes <= BLOCKING_CHARS_MAX:
            prompt = self._prompt(body, tools, kwargs)
        else:
            # Cleaning and rendering read the whole body: a long one would block the event loop for other requests.
            prompt = await asyncio.to_thread(self._prompt, body, tools, kwargs)
        return prompt, await self._model.tokenizer.encode(prompt, add_special_tokens=False, field="messages")

    def _prompt(self, body: ChatRequest, tools: Sequence[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        """The prompt: the messages as the chat template renders them."""
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise InvalidRequest("messages", "this model has no chat template; use /v1/completions")
        messages = for_template(body.messages, tokenizer.without_control)
        for number, message in enumerate(messages):
            check_text(f"messages[{number}].content", message["content"], tokenizer)
        text = tokenizer.chat_template.render(messages, add_generation_prompt=True, tools=tools or None, **kwargs)
        check_text("messages", text, tokenizer)
        return text

    def _tools(self, body: ChatRequest) -> list[dict[str, Any]]:
        """The tools that the chat template renders: the named one, all of them, or none."""
        if not body.tools:
            # "auto" with an empty list is what a client sends that has a list and no tools in it.
            if body.tool_choice not in (None, "none", "auto"):
                raise InvalidRequest("tool_choice", "requires tools")
            return []
        # Left out of the prompt, so that the model cannot call any.
        if body.tool_choice == "none":
            return []
        template = self._model.tokenizer.chat_template
        if template is None or not template.takes_tools:
            raise InvalidRequest("tools", "this model's chat template does not support tools")
        if self._parsers is None or self._parsers.tool_parser is None:
            raise InvalidRequest("tools", "this frontend was started without a tool parser (--tool-parser)")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        if isinstance(body.tool_choice, NamedToolChoice):
            name = body.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise InvalidRequest("tool_choice", f"{name[:64]!r} is not one of the tools")
        cleaned: list[dict[str, Any]] = without_control(tools, self._model.tokenizer.without_control)
        return cleaned

    def _template_kwargs(self, body: ChatRequest) -> dict[str, Any]:
        template = self._model.tokenizer.chat_template
        kwargs = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            kwargs |= self._effort(body.reasoning_effort)
        # Templates ignore unknown variables, so a misspelt one would have no effect without an error.
        for name in kwargs:
            if template is None or not template.takes(name):
                raise InvalidRequest("chat_template_kwargs", f"this model's chat template does not read {name[:64]!r}")
        cleaned: dict[str, Any] = without_control(kwargs, self._model.tokenizer.without_control)
        return cleaned

    def _effort(self, effort: str) -> dict[str, Any]:
        """The variables of the template for a `reasoning_effort`. Without degrees, a template can still have none."""
        template = self._model.tokenizer.chat_template
        if template is not None and template.takes("reasoning_effort"):
            return {"reasoning_effort": effort}
        if template is not None and effort == "none" and template.takes("enable_thinking"):
            return {"enable_thinking": False}
        raise InvalidRequest("reasoning_effort", "this model's chat template does not support it")

    async def _constrain(
        self,
        request: pb.GenerateRequest,
        body: ChatRequest,
        tools: Sequence[dict[str, Any]],
        prompt: str,
        kwargs: dict[str, Any],
    ) -> bool:
        """Constrain the output where a call is required or must follow its schema. Returns whether it did."""
        if not tools or self._parsers is None:
            return False
        choice = _choice(body)
        guided = await self._parsers.constraint(
            tools if choice == "auto" else [_strict(tool) for tool in tools],
            choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            prompt=prompt,
            template_kwargs=kwargs,
        )
        if guided is None:
            return False
        # An engine enforces one grammar per request.
        if request.HasField("guided"):
            raise InvalidRequest("tools", "with a required or strict call cannot be combined with another grammar")
        request.guided.CopyFrom(guided_to_proto(guided))
        return True

    async def _parsed(
        self, body: ChatRequest, tools: Sequence[dict[str, Any]], prompt: str, kwargs: dict[str, Any]
    ) -> ParsedStream | None:
        """A parser that separates tool calls and reasoning from text; None where the output is text only."""
        parsers = self._parsers
        if parsers is None or not (tools or parsers.reasoning_parser):
            return None
        # Its grammar allows JSON only, in which a marker is a part of a string.
        if not isinstance(body.response_format, TextFormat | None):
            return None
        return await parsers.open(
            tools,
            tool_choice=_choice(body),
            prompt=prompt,
            template_kwargs=kwargs,
            answers_at_once=body.regex is not None or body.ebnf is not None,
            previous_calls=sum(len(getattr(message, "tool_calls", None) or ()) for message in body.messages),
        )


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool with a strict schema: without one, the grammar of a required call allows any arguments."""
    return {**tool, "function": {"parameters": NO_PARAMETERS, **tool["function"], "strict": True}}


def _choice(body: ChatRequest) -> Any:
    if isinstance(body.tool_choice, NamedToolChoice):
        return body.tool_choice.model_dump()
    return body.tool_choice or "auto"
