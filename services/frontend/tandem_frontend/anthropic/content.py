"""Messages of a request and the blocks of their content.

Clients send back what a server sent, with annotations. What means nothing here is ignored inside a message or a block
(`cache_control`, `citations`, `signature`, `caller`); a block of another type is rejected by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem_frontend.openai.common_params import Many


class Content(BaseModel):
    """Base of messages and blocks: undeclared fields are ignored, nothing is converted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class TextBlock(Content):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Content):
    """Earlier reasoning of the model."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Content):
    """A tool call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolReferenceBlock(Content):
    """The name of a deferred tool that the client's search found: from here on the model may call it."""

    type: Literal["tool_reference"]
    tool_name: str


class ToolResultBlock(Content):
    """The result of a tool call. Its text says whether the tool failed: `is_error` has no form in a chat template."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Many[Annotated[TextBlock | ToolReferenceBlock, Field(discriminator="type")]] | None = None


class UserMessage(Content):
    """A turn of the user, with results of tools."""

    role: Literal["user"]
    content: str | Many[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class AssistantMessage(Content):
    """An earlier turn of the model."""

    role: Literal["assistant"]
    content: str | Many[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]


class SystemMessage(Content):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: str | Many[TextBlock]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]
