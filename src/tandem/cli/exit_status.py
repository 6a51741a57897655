"""How a subcommand ends: its exit status, and one sentence for what was raised on purpose.

Owns the names of settings as options; what the sentences say is the errors' own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console

from tandem.errors import ConfigError, StartError, TandemError
from tandem.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED

T = TypeVar("T")


class Interruption:
    """The signals of one command, from its construction on."""

    def __init__(self, console: Console, end_at_once: Callable[[], None]) -> None:
        """`end_at_once` is called on the second signal, last of all."""
        self.asked = asyncio.Event()
        self.second_status = EXIT_INTERRUPTED
        """Exit status after a second signal."""
        self._console = console
        self._end_at_once = end_at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._handle)

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of some work; None when a signal came first, and the work has been cancelled and has ended."""
        working = asyncio.create_task(work)
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self.asked.is_set():
            working.cancel()
            await asyncio.wait({working})
            return None
        return await working

    def _handle(self) -> None:
        if self.asked.is_set():
            self._end_at_once()
            # A live display hides it.
            self._console.show_cursor(True)
            os._exit(self.second_status)
        self._console.print("stopping (Ctrl-C again to end at once)", highlight=False)
        self.asked.set()


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
