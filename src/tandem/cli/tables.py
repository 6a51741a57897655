"""The console on which commands print their tables, and tables of plain columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 200
"""Characters of a line in a file or pipe: nothing is cut there."""


def table_console() -> Console:
    """The console of standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)


def print_columns(console: Console, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of cells below a head, each column as wide as its longest cell."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        # Long names wrap in the terminal: a cut worker id could not be passed to `tandem drain`.
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        console.print(text, highlight=False, markup=False, soft_wrap=True)
