"""The console on which commands print their tables."""

from __future__ import annotations

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 200
"""Characters of a line in a file or pipe: nothing is cut there."""


def table_console() -> Console:
    """The console of standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)
