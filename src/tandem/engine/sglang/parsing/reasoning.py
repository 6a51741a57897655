"""The first stage of a stream: separates reasoning from the answer, with SGLang's reasoning parser.

Owns the decision whether the output starts inside a reasoning block. SGLang guesses that from the template and the
request; here it is read from the end of the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from sglang.srt.parser.reasoning_parser import ReasoningParser

SPECIAL_TOKEN_PARSERS = frozenset({"apertus2509", "gemma4", "gpt-oss", "inkling", "kimi_k3", "mistral", "muse"})
"""Parsers whose markers are special tokens, which detokenization would drop by default."""


def make(
    name: str,
    prompt: str,
    template_kwargs: Mapping[str, Any],
    tokenizer: Any,
    *,
    before_tools: bool,
    answers_at_once: bool = False,
) -> ReasoningParser | None:
    """A reasoning parser for one stream; None if the prompt has closed the reasoning already.

    Args:
        name: the parser's name in SGLang.
        prompt: the end of the rendered prompt.
        template_kwargs: the request's chat template arguments, which some parsers depend on.
        tokenizer: for parsers that need one, else None.
        before_tools: whether tool calls are parsed after the reasoning.
        answers_at_once: whether the output begins outside of reasoning, whatever the prompt ends with.
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
    if answers_at_once:
        inside = False
    if inside is None:
        return parser
    if inside and not parser.detector._in_reasoning:
        return build(True)
    if not inside and parser.detector._in_reasoning:
        parser = build(False)
        # Some parsers always start inside a reasoning block, even with force_reasoning=False.
        return None if parser.detector._in_reasoning else parser
    return parser


def is_inside(prompt: str, start: str, end: str) -> bool | None:
    """True if the prompt ends with an opened reasoning block, False if with a closed one, None if with neither."""
    text = prompt.rstrip()
    if start and text.endswith(start):
        return True
    if end and text.endswith(end):
        return False
    return None
