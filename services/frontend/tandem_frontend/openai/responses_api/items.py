"""Items of `input`: the messages, reasoning, tool calls and their results of a conversation.

Clients send back items that a server made, with ids, states and annotations. What means nothing here is ignored inside
an item; an item or a part of another type is rejected by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tandem_frontend.openai.common_params import Many


class Item(BaseModel):
    """Base of all items: undeclared fields are ignored, nothing is converted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class InputText(Item):
    """Text of a client, or of the model in an earlier response."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class Refusal(Item):
    """An earlier refusal of a model."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What the model said."""
        return self.refusal


MessagePart = Annotated[InputText | Refusal, Field(discriminator="type")]


class MessageItem(Item):
    """A message of either side. `type` may be absent."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Many[MessagePart]


class FunctionCall(Item):
    """A tool call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class FunctionCallOutput(Item):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[InputText]


class ReasoningText(Item):
    """Reasoning of the model."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    """Reasoning of the model. A summary of it is for readers and is ignored."""

    type: Literal["reasoning"]
    content: Many[ReasoningText] | None = None
    encrypted_content: str | None = None


def _typed(item: Any) -> Any:
    """OpenAI's short form of a message has no type."""
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


InputItem = Annotated[
    MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem,
    Field(discriminator="type"),
    BeforeValidator(_typed),
]
