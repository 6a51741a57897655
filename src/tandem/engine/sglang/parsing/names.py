"""Reads the names of the installed SGLang's parsers from its source, without importing it.

So a wrong name is rejected in a fraction of a second; importing the parsers takes several.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from importlib import metadata
from pathlib import Path

from tandem.engine.sglang.compat import SGLANG_VERSION
from tandem.errors import ConfigError, StartError

INSTALL = 'install it with pip install ".[sglang]" in a checkout of Tandem (on a CPU: make setup)'
FILES = {
    "tool_parser": ("srt/function_call/parser_names.py", "TOOL_CALL_PARSER_NAMES"),
    "reasoning_parser": ("srt/parser/reasoning_parser_names.py", "REASONING_PARSER_NAMES"),
}
"""Setting -> file inside the sglang package, and the name of the list in it."""
NEAR_MAX = 5


def read_names() -> dict[str, list[str]]:
    """The parser names for each setting.

    Raises:
        StartError: SGLang is not installed, has another version, or does not have these lists.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise StartError(f"tool_parser and reasoning_parser need sglang, which is not installed: {INSTALL}")
    version = metadata.version("sglang")
    if version != SGLANG_VERSION:
        raise StartError(f"sglang is version {version}, but the parsers need {SGLANG_VERSION}: {INSTALL}")
    root = Path(spec.submodule_search_locations[0])
    return {setting: _list_in(root / file, name) for setting, (file, name) in FILES.items()}


def check_name(setting: str, name: str | None, names: list[str]) -> None:
    """Reject an unknown parser name.

    Raises:
        ConfigError: names the setting and the closest names, or all names if none is close.
    """
    if name is None or name in names:
        return
    near = difflib.get_close_matches(name, names, NEAR_MAX, cutoff=0.4)
    hint = f"closest: {', '.join(near)}" if near else f"available: {', '.join(names)}"
    kind = setting.replace("_", " ")
    raise ConfigError(setting, f"SGLang {SGLANG_VERSION} has no {kind} {name!r}; {hint}")


def _list_in(file: Path, name: str) -> list[str]:
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError) as problem:
        raise StartError(f"cannot read SGLang's parser names from {file}: {problem}") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise StartError(f"{file} does not define {name}")
