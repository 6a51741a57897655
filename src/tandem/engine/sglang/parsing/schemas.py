"""Tools as SGLang's detectors can read them: each parameter with one plain type.

A detector of a format without JSON converts a value by its parameter's type. Some see no type in a `$ref`, an `allOf`,
a `const` or an empty schema, and return text; one returns null for all that may be null. Grammars get the tools as the
client sent them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool

DEPTH_MAX = 16
NODES_MAX = 10_000
"""Schemas read for one tool: references may multiply. Beyond it a parameter has any type."""
ANY = "object"
"""The type for which detectors return JSON where a value is JSON, and text where it is not."""
_UNIONS = ("anyOf", "oneOf")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def with_plain_types(tools: Sequence[Tool]) -> list[Tool]:
    """The tools with one type for each parameter."""
    return [_plain_tool(tool) for tool in tools]


def _plain_tool(tool: Tool) -> Tool:
    parameters = tool.function.parameters
    if not isinstance(parameters, dict):
        return tool
    reader = _Reader(parameters)
    properties = {name: reader.plain(schema) for name, schema in reader.properties(parameters).items()}
    plain = {**{k: v for k, v in parameters.items() if k not in (*_UNIONS, "allOf", "$ref")}, "properties": properties}
    return tool.model_copy(update={"function": tool.function.model_copy(update={"parameters": plain})})


class _Reader:
    """Reads one tool's schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._nodes = 0

    def properties(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        """The properties of an object, in its references and branches too; the first declaration of each counts."""
        schema = self._resolved(schema, depth)
        found: dict[str, Any] = {}
        own = schema.get("properties")
        if isinstance(own, dict):
            found.update(own)
        for branch in self._branches(schema, (*_UNIONS, "allOf")):
            for name, inner in self.properties(branch, depth + 1).items():
                found.setdefault(name, inner)
        return found

    def plain(self, schema: Any) -> Any:
        """The schema of a parameter with one type, and without what names others."""
        resolved = self._resolved(schema, 0)
        kinds = self._types(resolved, 0)
        is_plain = isinstance(resolved.get("type"), str) and not {*_UNIONS, "allOf", "const"} & resolved.keys()
        if is_plain and kinds:
            return resolved
        names = ("description", "items", "additionalProperties")
        kept: dict[str, Any] = {key: resolved[key] for key in names if key in resolved}
        kind = _one(kinds)
        if kind == "object" and (inner := self.properties(resolved)):
            kept["properties"] = inner
        return {**kept, "type": kind}

    def _types(self, schema: Any, depth: int) -> set[str]:
        """The types that a value may have, without null; empty: any."""
        schema = self._resolved(schema, depth)
        own = schema.get("type")
        if isinstance(own, str | list):
            return {kind for kind in ([own] if isinstance(own, str) else own) if isinstance(kind, str)} - {"null"}
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return {_TYPES[type(value)] for value in values if type(value) in _TYPES}
        for branch in self._branches(schema, ("allOf",)):
            if kinds := self._types(branch, depth + 1):
                return kinds
        branches = self._branches(schema, _UNIONS)
        either = [self._types(branch, depth + 1) for branch in branches if not _is_null(branch)]
        if either:
            return set().union(*either) if all(either) else set()
        return {"object"} if "properties" in schema else {"array"} if "items" in schema else set()

    def _branches(self, schema: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        return [branch for name in names if isinstance(schema.get(name), list) for branch in schema[name]]

    def _resolved(self, schema: Any, depth: int) -> dict[str, Any]:
        """The schema with its reference followed; empty for what cannot be read, or not within the bounds."""
        for _ in range(DEPTH_MAX - depth):
            self._nodes += 1
            if not isinstance(schema, dict) or self._nodes > NODES_MAX:
                return {}
            if not isinstance(schema.get("$ref"), str):
                return schema
            others = {key: value for key, value in schema.items() if key != "$ref"}
            target = self._target(schema["$ref"])
            schema = {**target, **others} if isinstance(target, dict) else others
        return {}

    def _target(self, reference: str) -> Any:
        node: Any = self._root
        if not reference.startswith("#"):
            return None
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            node = node.get(part) if isinstance(node, dict) else None
        return node


def _one(kinds: set[str]) -> str:
    """One type for several: text where it may be text, as SGLang has it; else whatever JSON the value is."""
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds == {"integer", "number"}:
        return "number"
    return "string" if "string" in kinds else ANY


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and (schema.get("type") == "null" or schema.get("const", 0) is None)
