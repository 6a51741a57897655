"""The names of SGLang's arguments, read from its source: importing SGLang to know them takes many seconds.

Good for finding a wrong name before anything starts. The exact check, when the engine starts, is in `arguments.py`.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

FIELDS = Path("srt") / "arg_groups" / "fields"
"""Classes with a namespace, each argument an annotated name."""


def read_names() -> frozenset[str]:
    """Names of the arguments; empty where SGLang is not installed, or keeps them elsewhere."""
    package = importlib.util.find_spec("sglang")
    names: set[str] = set()
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for file in (Path(folder) / FIELDS).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    names |= _annotated(node)
    return frozenset(names)


def _annotated(node: ast.ClassDef) -> set[str]:
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
