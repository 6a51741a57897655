"""The request of POST /v1/responses. Types and sizes only; `translation` decides what the values mean.

Parameters that it shares with chat completions are inherited from them, also those that OpenAI's Responses API lacks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem_frontend.openai.common_params import CommonFields, Int32, Many, MustBeNull, Schema
from tandem_frontend.openai.responses_api.items import InputItem
from tandem_frontend.openai.schemas import NAME_PATTERN, TOOLS_MAX, JsonObjectFormat, TextFormat

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # Of tools and inputs that no request here can have.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class JsonSchemaFormat(Schema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: str = Field(pattern=NAME_PATTERN)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Schema):
    """The form of the text."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Schema):
    """How the model reasons."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class FunctionTool(Schema):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: MustBeNull = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Many[Literal["direct"]] | None = None
    async_: Literal[False] | None = Field(None, alias="async")


class NamespaceTool(Schema):
    """A group of functions: a call of one carries the group's name beside its own."""

    type: Literal["namespace"]
    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    tools: Annotated[Many[FunctionTool], Field(min_length=1, max_length=TOOLS_MAX)]


class NamedTool(Schema):
    """The name of a function."""

    type: Literal["function"]
    name: str


class AllowedTools(Schema):
    """The tools that may be called, of those in `tools`."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[NamedTool], Field(min_length=1, max_length=TOOLS_MAX)]


class StreamOptions(Schema):
    """What a stream contains."""

    include_obfuscation: bool | None = None


class ResponsesRequest(CommonFields):
    """Body of POST /v1/responses; docs/reference/responses.md describes each parameter."""

    input: str | Annotated[Many[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Int32 | None = None
    tools: (
        Annotated[
            Many[Annotated[FunctionTool | NamespaceTool, Field(discriminator="type")]], Field(max_length=TOOLS_MAX)
        ]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Many[Includable] | None = None
    top_logprobs: Int32 | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Accepted and ignored: they change nothing in the output.
    client_metadata: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None  # type: ignore[assignment]
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    max_tool_calls: Int32 | None = None
    prompt_cache_options: dict[str, Any] | None = None
    context_management: Annotated[list[Any], Field(max_length=0)] | None = None

    previous_response_id: MustBeNull = None
    conversation: MustBeNull = None
    prompt: MustBeNull = None
    moderation: MustBeNull = None
    access_programs: MustBeNull = None
    background_options: MustBeNull = None
    image: MustBeNull = None
    # Of chat completions only.
    n: MustBeNull = None
    max_tokens: MustBeNull = None
