"""Grammars, bounded before SGLang sees them and proven once it has compiled them.

`check` (pure, in the worker's process) refuses what is known to keep the compiler busy for minutes: a thread that
compiles cannot be stopped, and SGLang has few. The hooks (in the scheduler) refuse what compiled and still cannot be
used: a grammar that no text satisfies, or one whose every step would hold up all streams.
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
"""Repetitions without an upper end in a regular expression or a grammar: compiling takes the third power."""
STEP_CPU_S_MAX = 0.25
"""The first step's, in which an ambiguous grammar is already slow."""
CACHED_MAX = 512
UNSATISFIABLE = "no text satisfies it"
TIMED_OUT = "Grammar preprocessing timed out"
"""SGLang's words for a grammar whose compiling took longer than `environment.defaults` allows."""
_CLASS_OR_REPEAT = r"\\.|\[(?:\\.|[^\]\\])*\]|(?P<repeat>[*+]|\{\d*,\})"
_IN_REGEX = re.compile(_CLASS_OR_REPEAT, re.DOTALL)
_IN_EBNF = re.compile(r"\"(?:\\.|[^\"\\])*\"|" + _CLASS_OR_REPEAT, re.DOTALL)
_BACKEND = "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend"
_XGRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend"


def field_of(guided: Guided | None) -> str:
    """The one field that is set, as the caller knows it."""
    if guided is None:
        return "guided"
    return next((f"guided.{f.name}" for f in fields(guided) if getattr(guided, f.name) is not None), "guided")


def check(guided: Guided) -> None:
    """Refuse a grammar that would keep the compiler busy.

    Raises:
        InvalidRequest: names the field.
    """
    field = field_of(guided)
    told = guided.json_schema if guided.json_schema is not None else guided.structural_tag
    if told is not None:
        try:
            schema = json.loads(told)
        except (ValueError, RecursionError) as problem:
            raise InvalidRequest(field, f"is not JSON: {problem}") from None
        # Compiling takes the third power of the depth: minutes at 900.
        check_json_bounds(field, schema)
        _check_patterns(field, schema)
    if guided.regex is not None:
        _check_repeats(field, guided.regex, _IN_REGEX)
    if guided.ebnf is not None:
        _check_repeats(field, guided.ebnf, _IN_EBNF)


def _check_patterns(field: str, schema: Any) -> None:
    """The regular expressions inside of a schema."""
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
    """Those in brackets or behind a backslash, and in EBNF those in quotes, are no repetitions."""
    count = sum(found["repeat"] is not None for found in pattern.finditer(text))
    if count > REPEATS_MAX:
        raise InvalidRequest(field, f"has {count} repetitions without an upper end, more than {REPEATS_MAX}")


# --- In the scheduler


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {f"{_XGRAMMAR}._from_context": (_prove, "after"), f"{_BACKEND}.set_cache": (_remember, "around")}


def _prove(grammar: Any, backend: Any, *arguments: Any, **keywords: Any) -> Any:
    """Take the first step, in the thread that compiled: what it cannot take, or not in time, is refused like an error.

    SGLang would draw from nothing, and end the request as if the engine had broken.
    """
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    mask = grammar.allocate_vocab_mask(vocab_size=backend.vocab_size, batch_size=1, device="cpu")
    begin_s = time.thread_time()
    grammar.fill_vocab_mask(mask, 0)
    step_s = time.thread_time() - begin_s
    if not mask.any():
        return InvalidGrammarObject(UNSATISFIABLE)
    if step_s > STEP_CPU_S_MAX:
        return InvalidGrammarObject(f"it is too ambiguous: one step takes {step_s:.1f} s")
    return grammar


def _remember(original: Callable[..., Any], backend: Any, key: Any, value: Any) -> None:
    """SGLang keeps every grammar for ever, and one that was late in a busy moment as broken for ever."""
    if TIMED_OUT in getattr(value, "error_message", ""):
        return
    if len(backend.cache) >= CACHED_MAX:
        backend.reset()
    original(backend, key, value)
