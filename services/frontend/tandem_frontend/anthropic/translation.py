"""Translates a request of the Messages API to a chat request, and the names of its fields back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tandem.errors import InvalidRequest
from tandem_frontend.anthropic.content import (
    AssistantMessage,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from tandem_frontend.anthropic.schemas import (
    AnyChoice,
    NoChoice,
    PromptFields,
    ThinkingAdaptive,
    ThinkingDisabled,
    ThinkingEnabled,
    Tool,
    ToolChoice,
)
from tandem_frontend.openai import schemas as openai
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.history import History
from tandem_frontend.openai.translation import parameter

NAMES = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""Names of chat completions that are others here."""
OWN_FIELDS = {"n", "stop", "stream_options", "store", "metadata", "service_tier"}
"""Parameters of chat completions that a chat request translated from this API does not inherit."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn reasoning on and off."""
EFFORT_DEFAULT = "high"
"""The effort that Anthropic's API has where none is given: neutral where a chat template knows no effort."""


class Translated:
    """A request of the Messages API as a chat request."""

    def __init__(self, body: PromptFields, takes: Callable[[str], bool], *, reasons: bool) -> None:
        """Translate it.

        Args:
            body: the request.
            takes: whether the model's chat template reads a variable.
            reasons: whether reasoning is separated from text.

        Raises:
            InvalidRequest: names the client's parameter.
        """
        self._history = _history(body)
        copied = {name: getattr(body, name) for name in CommonFields.model_fields.keys() - OWN_FIELDS}
        choice = body.tool_choice
        is_single = getattr(choice, "disable_parallel_tool_use", None)
        self.chat = openai.ChatRequest.model_construct(
            **copied,
            stop=body.stop_sequences,
            messages=self._history.messages(),
            response_format=_response_format(body),
            tools=[_tool(tool) for tool in _offered(body)] or None,
            tool_choice=_tool_choice(choice),
            parallel_tool_calls=False if is_single else None,
            reasoning_effort=_effort(body, takes),
            chat_template_kwargs={**(body.chat_template_kwargs or {}), **_thinking(body, takes, reasons=reasons)},
        )

    @property
    def one_call_only(self) -> bool:
        """Whether the client takes one tool call only."""
        return self.chat.parallel_tool_calls is False

    def name(self, field: str) -> str:
        """The client's name of a field of the contract, or of a parameter of chat completions."""
        field = parameter(field, self.chat)
        place = self._history.place(field)
        if place is not None:
            return place
        return NAMES.get(field, f"stop_sequences{field[4:]}" if field == "stop" or field.startswith("stop[") else field)


def hides_thinking(body: PromptFields) -> bool:
    """Whether the client wants thinking blocks without their text."""
    return isinstance(body.thinking, ThinkingEnabled | ThinkingAdaptive) and body.thinking.display == "omitted"


def _history(body: PromptFields) -> History:
    history = History()
    if body.system:
        history.instruct(_texts(body.system), "system")
    for number, message in enumerate(body.messages):
        path = f"messages[{number}].content"
        match message:
            case SystemMessage(content=content):
                history.instruct(_texts(content), path)
            case UserMessage(content=content) | AssistantMessage(content=content):
                blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else content
                for index, block in enumerate(blocks):
                    _add(history, message.role, block, path if isinstance(content, str) else f"{path}[{index}]")
    if history.ends_with_the_model:
        raise InvalidRequest(
            f"messages[{len(body.messages) - 1}]",
            "must not be the assistant's: continuing a message (prefill) is not supported",
        )
    return history


def _add(history: History, role: str, block: Any, path: str) -> None:
    # Neighbouring turns of one side are one turn, as in Anthropic's API.
    match block:
        case TextBlock(text=text) if role == "user":
            history.ask([text], path, joins=True)
        case TextBlock(text=text):
            history.say([text], path, joins=True)
        case ThinkingBlock(thinking=text):
            history.think(text, path, joins=True)
        case ToolUseBlock():
            arguments = json.dumps(block.input, ensure_ascii=False)
            history.call(block.id, block.name, arguments, path, f"{path}.input")
        case ToolResultBlock():
            history.result(block.tool_use_id, _texts(block.content or ""), f"{path}.content")


def _texts(content: str | Sequence[TextBlock | ToolReferenceBlock]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [block.text if isinstance(block, TextBlock) else f"Found the tool {block.tool_name}." for block in content]


def _offered(body: PromptFields) -> list[Tool]:
    """The tools in the prompt: all but those that wait for a search, which finds them by a reference."""
    tools, found = body.tools or [], _found(body)
    names = {tool.name for tool in tools}
    for name, path in found.items():
        if name not in names:
            raise InvalidRequest(path, f"{name[:64]!r} is not one of the tools")
    offered = [tool for tool in tools if not tool.defer_loading or tool.name in found]
    if isinstance(body.tool_choice, ToolChoice) and body.tool_choice.name in names - {tool.name for tool in offered}:
        raise InvalidRequest("tool_choice.name", "is a deferred tool that no tool_reference has named yet")
    if tools and not offered:
        raise InvalidRequest("tools", "at least one must have no defer_loading")
    return offered


def _found(body: PromptFields) -> dict[str, str]:
    """The deferred tools that results of a search have named, and where the first one stands."""
    found: dict[str, str] = {}
    for number, message in enumerate(body.messages):
        if not isinstance(message, UserMessage) or isinstance(message.content, str):
            continue
        for index, block in enumerate(message.content):
            if not isinstance(block, ToolResultBlock) or isinstance(block.content, str):
                continue
            for part, reference in enumerate(block.content or ()):
                if isinstance(reference, ToolReferenceBlock):
                    path = f"messages[{number}].content[{index}].content[{part}].tool_name"
                    found.setdefault(reference.tool_name, path)
    return found


def _tool(tool: Tool) -> openai.Tool:
    function = openai.Function.model_construct(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return openai.Tool.model_construct(type="function", function=function)


def _tool_choice(choice: Any) -> Any:
    match choice:
        case AnyChoice():
            return "required"
        case NoChoice():
            return "none"
        case ToolChoice(name=name):
            function = openai.FunctionName.model_construct(name=name)
            return openai.NamedToolChoice.model_construct(type="function", function=function)
    return None


def _response_format(body: PromptFields) -> openai.JsonSchemaFormat | None:
    form = None if body.output_config is None else body.output_config.format
    if form is None:
        return None
    schema = openai.JsonSchema.model_construct(name="output", schema_=form.schema_)
    return openai.JsonSchemaFormat.model_construct(type="json_schema", json_schema=schema)


def _effort(body: PromptFields, takes: Callable[[str], bool]) -> str | None:
    effort = None if body.output_config is None else body.output_config.effort
    return None if effort == EFFORT_DEFAULT and not takes("reasoning_effort") else effort


def _thinking(body: PromptFields, takes: Callable[[str], bool], *, reasons: bool) -> dict[str, bool]:
    """The chat template's variable that turns reasoning on or off; nothing where the model decides."""
    switch = next((name for name in SWITCHES if takes(name)), None)
    match body.thinking:
        case ThinkingEnabled():
            if not reasons:
                raise InvalidRequest("thinking.type", "'enabled' requires a frontend with a reasoning parser")
            return {} if switch is None else {switch: True}
        case ThinkingDisabled():
            if switch is None and reasons:
                raise InvalidRequest("thinking.type", "'disabled' is not supported by this model's chat template")
            return {} if switch is None else {switch: False}
    return {}
