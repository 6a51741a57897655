"""Builds the grammar that constrains an engine's output to tool calls: SGLang's own constraint for each format.

Stateless. The result is grammar text and its kind (a field of Guided), which depends on the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.utils import get_json_schema_constraint, strip_structural_tag_excludes

from tandem.errors import InvalidRequest

KINDS = {
    "structural_tag": "structural_tag",
    "json_schema": "json_schema",
    "full_assistant_ebnf": "ebnf",
    "ebnf": "ebnf",
}
"""SGLang's kind of a constraint -> the field of Guided."""

WHITE_SPACE_MAX = 2


def is_forced(tool_choice: str | ToolChoice) -> bool:
    """Whether the model must call a tool: any ("required") or a named one."""
    return tool_choice == "required" or isinstance(tool_choice, ToolChoice)


def thinks_first(parser: FunctionCallParser) -> bool:
    """Whether the grammar of a forced call allows a reasoning block before the call."""
    detector = parser.detector
    return detector.get_structural_tag_name() is not None and detector.supports_structural_tag()


def constraint(
    parser: FunctionCallParser | None,
    tools: Sequence[Tool],
    tool_choice: str | ToolChoice,
    *,
    parallel: bool,
    thinks: bool,
    think_tokens: tuple[str, ...],
) -> dict[str, str] | None:
    """Kind (a field of Guided) and text of the grammar; None if the output is unconstrained.

    Args:
        parser: tool call parser; None if no format is known: forced calls are then a plain JSON array.
        tools: tools that may be called; with a named choice only that one, since some grammars allow all of them.
        tool_choice: in SGLang's form.
        parallel: whether more than one call is allowed.
        thinks: whether the output starts inside a reasoning block.
        think_tokens: the reasoning parser's markers, which the grammar must allow.

    Raises:
        InvalidRequest: the schemas of two tools contradict each other.
    """
    kind, grammar = None, None
    natively = False
    if parser is not None:
        natively = parser.detector.parses_required_natively()
        found = parser.get_structure_constraint(tool_choice, parallel_tool_calls=parallel, thinking_mode=thinks)
        if found is not None:
            kind, grammar = found
    if kind is None and is_forced(tool_choice) and not natively:
        try:
            kind, grammar = "json_schema", get_json_schema_constraint(list(tools), tool_choice, parallel)
        except ValueError as problem:
            raise InvalidRequest("tools", str(problem)) from None
    if kind is None or grammar is None:
        return None
    if kind == "structural_tag":
        strip_structural_tag_excludes(grammar, think_tokens)
    if hasattr(grammar, "model_dump"):
        grammar = grammar.model_dump(by_alias=True)
    if kind == "structural_tag" and isinstance(grammar, dict):
        grammar = _bounded(_triggered(grammar, one_only=not parallel))
    return {"kind": KINDS[kind], "grammar": grammar if isinstance(grammar, str) else json.dumps(grammar)}


def _triggered(grammar: dict[str, Any], *, one_only: bool) -> dict[str, Any]:
    """Convert SGLang's legacy structural tag to xgrammar's form, which can also end the output after one call."""
    if "structures" not in grammar:
        return grammar
    tags = [
        {
            "type": "tag",
            "begin": structure["begin"],
            "content": {"type": "json_schema", "json_schema": structure.get("schema") or {}},
            "end": structure["end"],
        }
        for structure in grammar["structures"]
    ]
    form = {
        "type": "triggered_tags",
        "triggers": grammar["triggers"],
        "tags": tags,
        "at_least_one": grammar.get("at_least_one", False),
        "stop_after_first": one_only,
    }
    return {"type": "structural_tag", "format": form}


def _bounded(form: Any) -> Any:
    """Limit white space in JSON schemas: a model can otherwise emit it until its token budget is used up."""
    if isinstance(form, list):
        return [_bounded(inner) for inner in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema" and "json_schema" in form:
        return {"max_whitespace_cnt": WHITE_SPACE_MAX, **form}
    return {name: _bounded(inner) for name, inner in form.items()}
