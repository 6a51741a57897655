"""Translates a request of the Responses API to a chat request, and the names of its fields back."""

from __future__ import annotations

from typing import Any

from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.history import History
from tandem_frontend.openai.responses_api.items import FunctionCall, FunctionCallOutput, MessageItem, ReasoningItem
from tandem_frontend.openai.responses_api.namespaces import Offered, flat, joined
from tandem_frontend.openai.responses_api.schemas import (
    AllowedTools,
    JsonSchemaFormat,
    NamedTool,
    ResponsesRequest,
)
from tandem_frontend.openai.schemas import (
    ChatRequest,
    Function,
    FunctionName,
    JsonSchema,
    NamedToolChoice,
    Tool,
)
from tandem_frontend.openai.schemas import JsonSchemaFormat as ChatJsonSchemaFormat
from tandem_frontend.openai.translation import parameter

LOGPROBS = "message.output_text.logprobs"
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Names of chat completions that are others here."""
OWN_FIELDS = {"n", "max_tokens", "stream_options"}
"""Parameters of chat completions that a chat request translated from this API does not inherit."""


class Translated:
    """A request of the Responses API as a chat request."""

    def __init__(self, body: ResponsesRequest) -> None:
        """Translate it.

        Raises:
            InvalidRequest: names the client's parameter.
        """
        self._history = _history(body)
        copied = {name: getattr(body, name) for name in CommonFields.model_fields.keys() - OWN_FIELDS}
        functions = flat(body.tools or ())
        self.names = {one.name: (one.namespace, one.function.name) for one in functions if one.namespace is not None}
        """The namespace and the name in it, by the model's name of a function."""
        wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
        self.chat = ChatRequest.model_construct(
            **copied,
            messages=self._history.messages(),
            max_completion_tokens=body.max_output_tokens,
            logprobs=wants_logprobs or None,
            top_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            response_format=_response_format(body),
            tools=[_tool(one) for one in _offered(body, functions)] or None,
            tool_choice=_tool_choice(body),
            parallel_tool_calls=body.parallel_tool_calls,
            reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
            chat_template_kwargs=body.chat_template_kwargs,
        )

    def name(self, field: str) -> str:
        """The client's name of a field of the contract, or of a parameter of chat completions."""
        field = parameter(field, self.chat)
        place = self._history.place(field)
        return NAMES.get(field, field) if place is None else place


def _history(body: ResponsesRequest) -> History:
    history = History()
    if body.instructions:
        history.instruct([body.instructions], "instructions")
    if isinstance(body.input, str):
        history.ask([body.input], "input")
        return history
    for number, item in enumerate(body.input):
        _add(history, item, f"input[{number}]")
    return history


def _add(history: History, item: Any, path: str) -> None:
    match item:
        case MessageItem():
            texts, place = _texts(item.content), f"{path}.content"
            if item.role == "assistant":
                history.say(texts, place)
            elif item.role == "user":
                history.ask(texts, place)
            else:
                history.instruct(texts, place)
        case FunctionCall():
            history.call(item.call_id, joined(item.namespace, item.name), item.arguments, path, f"{path}.arguments")
        case FunctionCallOutput():
            history.result(item.call_id, _texts(item.output), f"{path}.output")
        case ReasoningItem():
            if item.encrypted_content and not item.content:
                raise InvalidRequest(f"{path}.encrypted_content", "cannot be read here: another server encrypted it")
            if item.content:
                history.think("\n".join(_texts(item.content)), f"{path}.content")


def _texts(content: str | list[Any]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _offered(body: ResponsesRequest, functions: list[Offered]) -> list[Offered]:
    """The tools that the model may call."""
    if not isinstance(body.tool_choice, AllowedTools):
        return functions
    names = {one.name for one in functions}
    for number, allowed in enumerate(body.tool_choice.tools):
        if allowed.name not in names:
            raise InvalidRequest(f"tool_choice.tools[{number}].name", f"{allowed.name[:64]!r} is not one of the tools")
    kept = {allowed.name for allowed in body.tool_choice.tools}
    return [one for one in functions if one.name in kept]


def _tool(one: Offered) -> Tool:
    function = Function.model_construct(
        name=one.name, description=one.description, parameters=one.function.parameters, strict=one.function.strict
    )
    return Tool.model_construct(type="function", function=function)


def _tool_choice(body: ResponsesRequest) -> Any:
    match body.tool_choice:
        case NamedTool(name=name):
            return NamedToolChoice.model_construct(type="function", function=FunctionName.model_construct(name=name))
        case AllowedTools(mode=mode):
            return mode
    return body.tool_choice


def _response_format(body: ResponsesRequest) -> Any:
    form = None if body.text is None else body.text.format
    if not isinstance(form, JsonSchemaFormat):
        return form
    schema = JsonSchema.model_construct(
        name=form.name, description=form.description, schema_=form.schema_, strict=form.strict
    )
    return ChatJsonSchemaFormat.model_construct(type="json_schema", json_schema=schema)
