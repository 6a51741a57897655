"""The requests of POST /v1/messages and /v1/messages/count_tokens.

Types and sizes only; `translation` decides what the values mean. Sampling parameters are inherited from OpenAI's API,
also those that Anthropic's API lacks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem_frontend.anthropic.content import Message, TextBlock
from tandem_frontend.openai.common_params import CommonFields, Int32, Many, MustBeNull, Schema
from tandem_frontend.openai.schemas import TOOLS_MAX
from tandem_frontend.preparation.validation import STOPS_MAX

NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,128}$"


class Tool(Schema):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    # Not in the prompt before a `tool_reference` of the conversation names it.
    defer_loading: bool | None = None
    # Accepted and ignored: the prefix cache and the streaming of arguments need no request.
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: Many[Literal["direct"]] | None = None
    input_examples: Annotated[list[Any], Field(max_length=0)] | None = None


class AutoChoice(Schema):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Schema):
    """The model must call a tool."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Schema):
    """The model must call this tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Schema):
    """The model must not call a tool."""

    type: Literal["none"]


class ThinkingEnabled(Schema):
    """The model reasons first. The budget is a target in Anthropic's API too; here `max_tokens` is the only bound."""

    type: Literal["enabled"]
    budget_tokens: Int32
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Schema):
    """The model decides whether it reasons."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Schema):
    """The model does not reason."""

    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]


class JsonFormat(Schema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Schema):
    """The form of the output, and how much effort goes into it."""

    effort: str | None = None
    format: JsonFormat | None = None


class KeepThinking(Schema):
    """An edit that removes nothing."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Schema):
    """Edits of the context by the server: none is supported, but one that removes nothing is no edit."""

    edits: Many[KeepThinking] | None = None


class PromptFields(CommonFields):
    """What both requests have; docs/reference/messages.md describes each parameter."""

    messages: Many[Message] = Field(min_length=1)
    system: str | Many[TextBlock] | None = None
    tools: Annotated[Many[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: Annotated[Many[str], Field(max_length=STOPS_MAX)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Accepted and ignored: they change nothing in the output.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None  # type: ignore[assignment]
    speed: Literal["standard"] | None = None
    cache_control: dict[str, Any] | None = None
    context_management: ContextManagement | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None

    container: MustBeNull = None
    inference_geo: MustBeNull = None
    diagnostics: MustBeNull = None
    compaction: MustBeNull = None
    fallbacks: MustBeNull = None
    thread: MustBeNull = None
    # Of OpenAI's API only.
    n: MustBeNull = None
    stop: MustBeNull = None
    stream_options: MustBeNull = None
    store: MustBeNull = None


class MessagesRequest(PromptFields):
    """Body of POST /v1/messages."""

    max_tokens: Int32


class CountTokensRequest(PromptFields):
    """Body of POST /v1/messages/count_tokens. Parameters that do not change the prompt are accepted and ignored."""
