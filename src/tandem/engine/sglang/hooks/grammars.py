"""Grammar checks: size limits before SGLang compiles a grammar, and a trial step after.

`check` (pure, in the worker's process) rejects grammars that are known to compile for minutes: a compiling thread
cannot be stopped, and SGLang has few. The hooks (in the scheduler) reject grammars that compile but are unusable: no
text satisfies them, or each step would delay all streams.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tandem.domain.generation import Guided
from tandem.domain.json_bounds import check_json_bounds
from tandem.errors import InvalidRequest

REPEATS_MAX = 100
"""Unbounded repetitions in a regular expression or a grammar: compile time grows with their number cubed."""
STEP_CPU_S_MAX = 0.25
"""CPU time limit of the first step, which is already slow for an ambiguous grammar."""
CACHED_MAX = 512
UNSATISFIABLE = "no text satisfies it"
TIMED_OUT = "Grammar preprocessing timed out"
"""SGLang's error message for a grammar that exceeded the compile timeout set in `environment.defaults`."""
_CLASS_OR_REPEAT = r"\\.|\[(?:\\.|[^\]\\])*\]|(?P<repeat>[*+]|\{\d*,\})"
_IN_REGEX = re.compile(_CLASS_OR_REPEAT, re.DOTALL)
_IN_EBNF = re.compile(r"\"(?:\\.|[^\"\\])*\"|" + _CLASS_OR_REPEAT, re.DOTALL)
_BACKEND = "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend"
_XGRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend"


def field_of(guided: Guided | None) -> str:
    """Request field name of the grammar that is set, for error messages."""
    if guided is None:
        return "guided"
    return next((f"guided.{f.name}" for f in fields(guided) if getattr(guided, f.name) is not None), "guided")


def check(guided: Guided) -> None:
    """Reject a grammar that would compile for too long.

    Raises:
        InvalidRequest: names the field and the limit.
    """
    field = field_of(guided)
    schema_text = guided.json_schema if guided.json_schema is not None else guided.structural_tag
    if schema_text is not None:
        try:
            schema = json.loads(schema_text)
        except (ValueError, RecursionError) as problem:
            raise InvalidRequest(field, f"is not JSON: {problem}") from None
        # Compile time grows with the depth cubed: minutes at 900.
        check_json_bounds(field, schema)
        _check_patterns(field, schema)
    if guided.regex is not None:
        _check_repeats(field, guided.regex, _IN_REGEX)
    if guided.ebnf is not None:
        _check_repeats(field, guided.ebnf, _IN_EBNF)


def _check_patterns(field: str, schema: Any) -> None:
    """Check every regular expression (`pattern`) inside a schema."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                _check_repeats(field, node["pattern"], _IN_REGEX)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _check_repeats(field: str, text: str, pattern: re.Pattern[str]) -> None:
    """Count unbounded repetitions, except in character classes, after a backslash and, in EBNF, in quotes."""
    count = sum(found["repeat"] is not None for found in pattern.finditer(text))
    if count > REPEATS_MAX:
        raise InvalidRequest(field, f"has {count} unbounded repetitions, more than {REPEATS_MAX}")


# --- In the scheduler


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {
        f"{_XGRAMMAR}._from_context": (_check_first_step, "after"),
        f"{_BACKEND}.set_cache": (_cache_bounded, "around"),
    }


def _check_first_step(grammar: Any, backend: Any, *arguments: Any, **keywords: Any) -> Any:
    """Run the first step in the compiling thread; reject a grammar that allows no token or takes too long.

    SGLang would otherwise sample from no token, and fail the request as if the engine had failed.
    """
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    mask = grammar.allocate_vocab_mask(vocab_size=backend.vocab_size, batch_size=1, device="cpu")
    begin_s = time.thread_time()
    grammar.fill_vocab_mask(mask, 0)
    step_s = time.thread_time() - begin_s
    if not mask.any():
        return InvalidGrammarObject(UNSATISFIABLE)
    if step_s > STEP_CPU_S_MAX:
        return InvalidGrammarObject(f"too ambiguous: one step takes {step_s:.1f} s, the limit is {STEP_CPU_S_MAX:g} s")
    return grammar


def _cache_bounded(original: Callable[..., Any], backend: Any, key: Any, value: Any) -> None:
    """Bound SGLang's unbounded grammar cache, and do not cache a timeout: it would reject the grammar forever."""
    if TIMED_OUT in getattr(value, "error_message", ""):
        return
    if len(backend.cache) >= CACHED_MAX:
        backend.reset()
    original(backend, key, value)
