"""Deltas of a parsed stream, in the order in which the model wrote them. Pure value types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """The next text of the answer itself, without markup."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next text of the model's reasoning, which precedes the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Start of a tool call: one per call, before its arguments."""

    index: int
    """From 0, in the order of the calls."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of a call's arguments; the fragments of one index concatenate to one JSON object."""

    index: int
    json_fragment: str


Delta = Content | Reasoning | ToolCallStart | ToolCallArguments


def read(items: Iterable[list[Any]]) -> list[Delta]:
    """Decode deltas from the parser host's JSON lists."""
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
    raise AssertionError(f"the parser host sent a delta of unknown kind {kind!r}")
