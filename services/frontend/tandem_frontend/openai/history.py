"""The messages of a conversation, collected from the turns and items of the doors that have no list of messages.

Owns which items become one message, and where each message stood in the client's request, for errors about it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_frontend.openai.messages import (
    AssistantMessage,
    CalledFunction,
    Content,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)

Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
PLACE = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\]\.function\.arguments)?")


@dataclass(slots=True)
class _Turn:
    """A message while it is collected."""

    role: Literal["system", "user", "assistant", "tool"]
    path: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_paths: list[str] = field(default_factory=list)
    call_id: str = ""

    def message(self) -> Message:
        # Built without validation: the door's own schema has checked every value.
        content: Any = _content(self.texts)
        match self.role:
            case "system":
                return SystemMessage.model_construct(role="system", content=content)
            case "user":
                return UserMessage.model_construct(role="user", content=content)
            case "tool":
                return ToolMessage.model_construct(role="tool", content=content, tool_call_id=self.call_id)
            case "assistant":
                return AssistantMessage.model_construct(
                    role="assistant",
                    content=content,
                    tool_calls=self.calls or None,
                    reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
                )


class History:
    """Collects messages in the order of the conversation. Every `path` is the client's name of what is added."""

    def __init__(self) -> None:
        self._turns: list[_Turn] = []

    def instruct(self, texts: Sequence[str], path: str) -> None:
        """Add instructions. Neighbours are one message, because many chat templates allow one only."""
        self._turn("system", path, joins=True).texts.extend(texts)

    def ask(self, texts: Sequence[str], path: str, *, joins: bool = False) -> None:
        """Add a message of the user; with `joins` to the one before it, if that is the user's too."""
        self._turn("user", path, joins=joins).texts.extend(texts)

    def think(self, text: str, path: str, *, joins: bool = False) -> None:
        """Add reasoning of the model, which precedes its text and its calls; with `joins` also behind them."""
        self._assistant(path, joins=joins, follows=False).thoughts.append(text)

    def say(self, texts: Sequence[str], path: str, *, joins: bool = False) -> None:
        """Add text of the model, to reasoning before it or as a message of its own; with `joins` never as another."""
        self._assistant(path, joins=joins, follows=False).texts.extend(texts)

    def call(self, call_id: str, name: str, arguments: str, path: str, arguments_path: str) -> None:
        """Add a tool call of the model to its reasoning, text and calls before. `arguments` is JSON text."""
        function = CalledFunction.model_construct(name=name, arguments=arguments)
        turn = self._assistant(path, joins=True, follows=True)
        turn.calls.append(ToolCall.model_construct(id=call_id, type="function", function=function))
        turn.call_paths.append(arguments_path)

    def result(self, call_id: str, texts: Sequence[str], path: str) -> None:
        """Add the result of a tool call."""
        turn = self._turn("tool", path)
        turn.call_id = call_id
        turn.texts.extend(texts)

    @property
    def ends_with_the_model(self) -> bool:
        """Whether the last message is the model's."""
        return bool(self._turns) and self._turns[-1].role == "assistant"

    def messages(self) -> list[Message]:
        """The messages."""
        return [turn.message() for turn in self._turns]

    def place(self, name: str) -> str | None:
        """The client's path of a field `messages[…]` of the messages; None: it names another field."""
        found = PLACE.match(name)
        if found is None or int(found[1]) >= len(self._turns):
            return None
        turn = self._turns[int(found[1])]
        return turn.path if found[2] is None else turn.call_paths[int(found[2])]

    def _assistant(self, path: str, *, joins: bool, follows: bool) -> _Turn:
        last = self._turns[-1] if self._turns else None
        is_begun = last is not None and last.role == "assistant" and bool(last.texts or last.calls)
        return self._turn("assistant", path, joins=joins or follows or not is_begun)

    def _turn(self, role: Literal["system", "user", "assistant", "tool"], path: str, *, joins: bool = False) -> _Turn:
        if joins and self._turns and self._turns[-1].role == role:
            return self._turns[-1]
        self._turns.append(_Turn(role, path))
        return self._turns[-1]


def _content(texts: Sequence[str]) -> Content:
    # How several parts are joined is decided in one place, where chat completions does it.
    if len(texts) > 1:
        return [TextPart.model_construct(type="text", text=text) for text in texts]
    return texts[0] if texts else ""
