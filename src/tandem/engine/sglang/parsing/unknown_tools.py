"""Calls to tools that a request does not have: they become content, whichever way SGLang's detectors treat them.

Some detectors return such a call, some drop its text, some lose the valid call behind it. So they are made to return
all calls, and the stages of a stream sort them out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tandem.engine.sglang.parsing.json_text import is_valid


@dataclass(slots=True)
class UnknownCall:
    """A call to an unknown tool, while its arguments arrive."""

    tool_index: int
    """SGLang's index of the call."""
    name: str
    arguments: str = ""

    def as_text(self) -> str:
        """The call as content: the JSON object of its name and arguments."""
        arguments = self.arguments if is_valid(self.arguments) else json.dumps(self.arguments, ensure_ascii=False)
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {arguments}}}'


class _AllNames(dict[str, int]):
    """Indices of tools by name, for a detector that drops what is not in it."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name)

    def __missing__(self, name: str) -> int:
        return -1


def accept_all_names(detector: Any) -> None:
    """Have a detector return calls to unknown tools too."""
    own = detector._get_tool_indices
    detector._get_tool_indices = lambda tools: _AllNames(own(tools))
