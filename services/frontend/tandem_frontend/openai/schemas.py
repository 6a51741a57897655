"""The schemas of the two requests that generate: chat completions and completions.

Types and sizes only; `translation` decides what the values mean.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem_frontend.openai.common_params import CommonFields, Int32, Many, MustBeNull, Schema, TokenId, only
from tandem_frontend.openai.messages import Message

TOOLS_MAX = 128
NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,64}$"


class JsonSchema(Schema):
    """The JSON schema that the output must follow."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Schema):
    """Plain text: no grammar."""

    type: Literal["text"]


class JsonObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Schema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(Schema):
    """A function that the model may call."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Annotated[Any, Field(exclude=True)] = None
    """Ignored: an annotation for other servers."""


class Tool(Schema):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function
    cache_control: Annotated[Any, Field(exclude=True)] = None
    """Ignored: an annotation for other servers."""


class FunctionName(Schema):
    """The name of a function."""

    name: str


class NamedToolChoice(Schema):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(CommonFields):
    """Body of POST /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Many[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: Many[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    audio: MustBeNull = None
    functions: Annotated[None, only([])] = None
    function_call: Annotated[None, only("none", "auto")] = None
    prediction: MustBeNull = None
    verbosity: Annotated[None, only("medium")] = None
    web_search_options: MustBeNull = None

    # Not in OpenAI's chat API; see ForeignFields.
    echo: Annotated[None, only(False)] = None
    best_of: Annotated[None, only(1)] = None
    documents: Annotated[None, only([])] = None
    add_generation_prompt: Annotated[None, only(True)] = None
    continue_final_message: Annotated[None, only(False)] = None
    add_special_tokens: Annotated[None, only(False)] = None
    separate_reasoning: Annotated[None, only(True)] = None
    stream_reasoning: Annotated[None, only(True)] = None


TokenIds = Many[TokenId]


class CompletionRequest(CommonFields):
    """Body of POST /v1/completions."""

    prompt: str | Many[str] | TokenIds | Many[TokenIds]
    echo: bool | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None
    response_format: ResponseFormat | None = None

    suffix: Annotated[None, only("")] = None
    add_special_tokens: Annotated[None, only(True)] = None

    @property
    def is_echo_only(self) -> bool:
        """Whether the prompt alone is asked for: harnesses that rate texts generate nothing."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def echoes_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None


class EmbeddingsRequest(Schema):
    """Body of POST /v1/embeddings."""

    model: str = Field(min_length=1, max_length=MODEL_NAME_CHARS_MAX)
    input: str | Many[str] | TokenIds | Many[TokenIds]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int32 | None = None

    # Not in OpenAI's API; named as in other inference servers.
    priority: Int32 | None = None

    # Not in OpenAI's API, and not supported; see ForeignFields.
    input_type: MustBeNull = None
    truncate: Annotated[None, only("NONE")] = None
    truncate_prompt_tokens: MustBeNull = None

    # Accepted and ignored: a label.
    user: str | None = None
