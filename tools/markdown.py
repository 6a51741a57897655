"""What the generators of reference pages share: cells and rows of tables, and the check of a page for drift."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def plain(text: str) -> str:
    """A text as Markdown shows it: no HTML, no emphasis, one line. What is between backticks stays code."""
    parts = " ".join(text.split()).split("`")
    return "`".join(re.sub(r"\|" if index % 2 else r"[\\*<|]", r"\\\g<0>", part) for index, part in enumerate(parts))


def code(text: str) -> str:
    """A text as code inside a cell of a table; empty for an empty one."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a table."""
    names = tuple(heads)
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def generated(page: Path, mark: str, lines: Iterable[str]) -> str:
    """The whole page: what is written by hand, up to and with `mark`, and the generated lines after it."""
    by_hand, _, _ = page.read_text().partition(mark)
    return by_hand + mark + "\n".join(lines).rstrip() + "\n"


def write_or_check(page: Path, text: str, source: str, tool: str) -> int:
    """Write the page; with --check, only compare it. Returns the exit status: 1 when it differs."""
    if "--check" not in sys.argv[1:]:
        page.write_text(text)
        return 0
    if page.is_file() and page.read_text() == text:
        return 0
    print(f"{page.relative_to(ROOT)} differs from {source}: run tools/{tool}", file=sys.stderr)
    return 1
