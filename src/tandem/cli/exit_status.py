"""How a subcommand exits: its exit status, and one printed sentence for each Tandem error.

Owns the mapping from setting names to option names; the sentence itself comes from the error.
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
    """Handles SIGINT and SIGTERM of one command, from its construction on."""

    def __init__(self, console: Console, end_at_once: Callable[[], None]) -> None:
        """`end_at_once` is called on the second signal, just before the process exits."""
        self.requested = asyncio.Event()
        self.second_status = EXIT_INTERRUPTED
        """Exit status after a second signal."""
        self._console = console
        self._end_at_once = end_at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._handle)

    async def unless_requested(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None if a signal arrived first, after `work` has been cancelled and has ended."""
        working = asyncio.create_task(work)
        requested = asyncio.create_task(self.requested.wait())
        await asyncio.wait({working, requested}, return_when=asyncio.FIRST_COMPLETED)
        requested.cancel()
        if self.requested.is_set():
            working.cancel()
            await asyncio.wait({working})
            return None
        return await working

    def _handle(self) -> None:
        if self.requested.is_set():
            self._end_at_once()
            # os._exit skips the cleanup of rich's live display, which hides the cursor.
            self._console.show_cursor(True)
            os._exit(self.second_status)
        self._console.print("stopping (Ctrl-C again to end at once)", highlight=False)
        self.requested.set()


def end(command: str, work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a subcommand and exit with its status; a Tandem error is printed as one sentence."""
    end_call(command, lambda: asyncio.run(work))


def end_call(command: str, work: Callable[[], int]) -> NoReturn:
    """`end` for a subcommand that needs no event loop."""
    try:
        exit_status = work()
    except ConfigError as problem:
        exit_status = _report(command, _as_option(problem), problem.exit_status)
    except StartError as problem:
        exit_status = _report(command, str(problem), problem.exit_status)
    except TandemError as problem:
        exit_status = _report(command, f"{problem} ({_reason(problem)})", EXIT_FAILED)
    raise typer.Exit(exit_status)


def _report(command: str, sentence: str, exit_status: int) -> int:
    print(f"tandem {command}: {sentence}", file=sys.stderr)
    return exit_status


def _reason(problem: TandemError) -> str:
    """The reason, and why a broken stream was not continued, where known."""
    why_not = problem.metadata.get("continuation")
    return problem.reason if why_not is None else f"{problem.reason}; not continued: {why_not}"


def _as_option(problem: ConfigError) -> str:
    """The error message with the setting named as its command-line option."""
    key, _, inner = problem.key.partition(".")
    # An argument is named as in the help, in capitals.
    if not key.isidentifier() or key.isupper():
        return str(problem)
    message = problem.message.removeprefix(f"{problem.key}: ")
    return f"--{key.replace('_', '-')}: {f'{inner}: ' if inner else ''}{message}"
