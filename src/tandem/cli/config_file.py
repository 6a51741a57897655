"""`tandem up --config FILE`: options of a command from a TOML file, under the names of its flags.

Owns the file's keys, their types and the errors, which name the file, the line and the key. A flag on the command line
overrides the file. What a value means is checked by the command, for flags and files alike.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperOption
from typer.exceptions import TyperException

from tandem.cli.arguments import CONSUL, LOCAL
from tandem.errors import ConfigError

OWN = ("config", "help")
"""Options that no file has."""
PLACES = "tandem.cli.config_file"
"""Key of the context's data: where each of the file's keys stands."""


def use(context: typer.Context, file: Path | None) -> Path | None:
    """Callback of the option: make the file's values the defaults of the command's options.

    Raises:
        typer.BadParameter: the file cannot be read, or a key or its value is wrong.
    """
    if file is None or context.resilient_parsing:
        return file
    try:
        text = file.read_text()
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise typer.BadParameter(f"{file} cannot be read: {problem}") from None
    options = {_key(option): option for option in context.command.params if isinstance(option, TyperOption)}
    defaults = dict[str, Any]()
    places = context.meta[PLACES] = dict[str, str]()
    for key, value in values.items():
        place = f"{file}, line {_line(text, key)}: {key}"
        option = options.get(key)
        if option is None or option.name is None or key in OWN:
            raise typer.BadParameter(f"{place} is not an option of `{context.command_path}`")
        defaults[option.name], places[option.name] = _value(option, value, place, context), place
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


async def located(context: typer.Context, work: Coroutine[Any, Any, int]) -> int:
    """Await the command; an error of a setting that came from the file names its place there.

    Raises:
        ConfigError: as `work` does.
    """
    try:
        return await work
    except ConfigError as problem:
        name = problem.key.partition(".")[0]
        place = context.meta.get(PLACES, {}).get(name)
        source = context.get_parameter_source(name)
        if place is None or source is None or source.name != "DEFAULT_MAP":
            raise
        raise ConfigError(place, problem.message.removeprefix(f"{problem.key}: ")) from None


def _key(option: TyperOption) -> str:
    """The flag's name with underscores, as in the files of the services."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def _value(option: TyperOption, value: Any, place: str, context: typer.Context) -> Any:
    if option.opts[0] == CONSUL and value is True:
        return LOCAL
    if option.is_flag:
        if not isinstance(value, bool):
            raise typer.BadParameter(f"{place} must be true or false")
        return value
    # An option that may be given several times is a list, or one value without brackets.
    given = value if option.multiple and isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in given) or not given:
        raise typer.BadParameter(f"{place} must be {'texts' if option.multiple else 'a text or a number'}")
    # The command line has texts only: one rule for both.
    texts: Any = [str(one) for one in given] if option.multiple else str(value)
    try:
        option.process_value(context, texts)
    except TyperException as problem:
        raise typer.BadParameter(f"{place}: {getattr(problem, 'message', problem)}") from None
    return texts


def _line(text: str, key: str) -> int:
    """Where a key of the file stands, from 1."""
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[.=\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)
