"""The first half of a stream: what the model thinks, told from what it answers, by SGLang's reasoning parser.

Owns the question whether the prompt leaves the model inside a block of reasoning. SGLang guesses it from the template
and the request; the rendered prompt knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from sglang.srt.parser.reasoning_parser import ReasoningParser

SPECIAL_TOKEN_PARSERS = frozenset({"apertus2509", "gemma4", "gpt-oss", "inkling", "kimi_k3", "mistral", "muse"})
"""Their markers are special tokens, which a detokeniser would otherwise leave out."""


def make(
    name: str, prompt: str, template_kwargs: Mapping[str, Any], tokenizer: Any, *, before_tools: bool
) -> ReasoningParser | None:
    """The parser of one stream; None where the prompt has closed the reasoning already.

    Args:
        name: of the parser.
        prompt: the end of the rendered prompt.
        template_kwargs: what the request gave to the template; some parsers look at it.
        tokenizer: for parsers that need one, else None.
        before_tools: whether tool calls are parsed behind it.
    """

    def build(forced: bool | None) -> ReasoningParser:
        request = SimpleNamespace(
            chat_template_kwargs=dict(template_kwargs), reasoning_effort=template_kwargs.get("reasoning_effort")
        )
        return ReasoningParser(
            name,
            force_reasoning=forced,
            request=request,
            tokenizer=tokenizer,
            tool_call_parser_active=before_tools,
        )

    parser = build(None)
    inside = is_inside(prompt, parser.detector.think_start_token, parser.detector.think_end_token)
    if inside is None:
        return parser
    if inside and not parser.detector._in_reasoning:
        return build(True)
    if not inside and parser.detector._in_reasoning:
        parser = build(False)
        # Some always begin inside.
        return None if parser.detector._in_reasoning else parser
    return parser


def is_inside(prompt: str, start: str, end: str) -> bool | None:
    """Whether a prompt ends in an open block of reasoning, or in a closed one; None: in neither."""
    text = prompt.rstrip()
    if start and text.endswith(start):
        return True
    if end and text.endswith(end):
        return False
    return None
