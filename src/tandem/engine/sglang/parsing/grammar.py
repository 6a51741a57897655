"""What an engine must be held to so that its output is a tool call: SGLang's own constraint for each format.

Stateless. A grammar is text in the end; which kind it is follows the format.
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


def is_forced(tool_choice: str | ToolChoice) -> bool:
    """Whether the model must call: any tool ("required") or one that is named."""
    return tool_choice == "required" or isinstance(tool_choice, ToolChoice)


def thinks_first(parser: FunctionCallParser) -> bool:
    """Whether the grammar of a forced call can have a block of reasoning before the call."""
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
    """The field of Guided and the grammar, or None where the model is to be left free.

    Args:
        parser: of these tools; None where no format is known: forced calls are then a plain JSON array.
        tools: which may be called; of a named choice only the named one, since some grammars allow all they are given.
        tool_choice: as SGLang has it.
        parallel: whether there may be more than one call.
        thinks: whether the output begins with the rest of a block of reasoning.
        think_tokens: the reasoning parser's markers, which the grammar must not forbid.

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
    return {"kind": KINDS[kind], "grammar": _text(grammar)}


def _text(grammar: Any) -> str:
    if isinstance(grammar, str):
        return grammar
    if hasattr(grammar, "model_dump"):
        grammar = grammar.model_dump(by_alias=True)
    return json.dumps(grammar, ensure_ascii=False)
