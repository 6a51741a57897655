"""Functions of a namespace: one flat list of tools for the model, and the client's two names for each call.

A model and its chat template know tools by one name. So a function of a namespace is `NAMESPACE__NAME` in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.errors import InvalidRequest
from tandem_frontend.openai.responses_api.schemas import FunctionTool, NamespaceTool
from tandem_frontend.openai.schemas import TOOLS_MAX

SEPARATOR = "__"
NAME_CHARS_MAX = 64
"""Of a tool, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class Offered:
    """A function as the model sees it."""

    name: str
    function: FunctionTool
    namespace: str | None = None
    about: str = ""
    """The description of its namespace."""

    @property
    def description(self) -> str | None:
        """What the prompt says about it: its namespace has no place of its own there."""
        return "\n\n".join(text for text in (self.about, self.function.description) if text) or None


def joined(namespace: str | None, name: str) -> str:
    """The model's name of a function."""
    return name if namespace is None else f"{namespace}{SEPARATOR}{name}"


def flat(tools: Sequence[FunctionTool | NamespaceTool]) -> list[Offered]:
    """All functions, each under a name of its own.

    Raises:
        InvalidRequest: two have one name, a name is too long, or there are too many.
    """
    found: dict[str, Offered] = {}
    for number, tool in enumerate(tools):
        if isinstance(tool, FunctionTool):
            each = [(f"tools[{number}].name", Offered(tool.name, tool))]
        else:
            each = [
                (
                    f"tools[{number}].tools[{index}].name",
                    Offered(joined(tool.name, one.name), one, tool.name, tool.description or ""),
                )
                for index, one in enumerate(tool.tools)
            ]
        for path, one in each:
            if len(one.name) > NAME_CHARS_MAX:
                raise InvalidRequest(path, f"is longer than {NAME_CHARS_MAX} characters with its namespace")
            # Chat completions leave equal names of plain functions to the model; here a call would be ambiguous.
            if one.name in found and (one.namespace or found[one.name].namespace):
                raise InvalidRequest(path, f"is the same as another tool's with its namespace: {one.name!r}")
            found[one.name] = one
    if len(found) > TOOLS_MAX:
        raise InvalidRequest("tools", f"must hold at most {TOOLS_MAX} functions, those of namespaces included")
    return list(found.values())
