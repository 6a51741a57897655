"""What a parsed stream consists of. Pure values; they come in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer itself, without markup."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool is called. Comes once for each call, before its arguments."""

    index: int
    """From 0, in the order of the calls."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: the fragments of one index make one JSON object together."""

    index: int
    json_fragment: str


Delta = Content | Reasoning | ToolCallStart | ToolCallArguments


def read(items: Iterable[list[Any]]) -> list[Delta]:
    """Deltas as the parser host writes them."""
    return [_read(item) for item in items]


def _read(item: list[Any]) -> Delta:
    kind, *values = item
    match kind:
        case "c":
            return Content(*values)
        case "r":
            return Reasoning(*values)
        case "s":
            return ToolCallStart(*values)
        case "a":
            return ToolCallArguments(*values)
    raise AssertionError(f"the parser host wrote a delta of no known kind: {kind!r}")
