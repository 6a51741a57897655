"""How a subcommand ends: its exit status, and one sentence for what was raised on purpose.

Owns the names of settings as options; what the sentences say is the errors' own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

import typer

from tandem.errors import ConfigError, StartError, TandemError

EXIT_FAILED = 1


def end(command: str, work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a subcommand to its exit status; what it raises on purpose becomes one sentence."""
    try:
        exit_status = asyncio.run(work)
    except ConfigError as problem:
        exit_status = _say(command, _as_option(problem), problem.exit_status)
    except StartError as problem:
        exit_status = _say(command, str(problem), problem.exit_status)
    except TandemError as problem:
        exit_status = _say(command, f"{problem} ({_reason(problem)})", EXIT_FAILED)
    raise typer.Exit(exit_status)


def _say(command: str, sentence: str, exit_status: int) -> int:
    print(f"tandem {command}: {sentence}", file=sys.stderr)
    return exit_status


def _reason(problem: TandemError) -> str:
    """The reason, and why a broken stream did not go on where that is known."""
    why_not = problem.metadata.get("continuation")
    return problem.reason if why_not is None else f"{problem.reason}; not continued: {why_not}"


def _as_option(problem: ConfigError) -> str:
    """The sentence about a setting, with the name it has on this command line."""
    key, _, inner = problem.key.partition(".")
    if not key.isidentifier():
        return str(problem)
    words = problem.message.removeprefix(f"{problem.key}: ")
    return f"--{key.replace('_', '-')}: {f'{inner}: ' if inner else ''}{words}"
