"""One Markdown table, and the measurements that may stand in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """One table; nothing for no rows."""
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def measured(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A measurement that was taken: not one that failed, or found no time."""
    found = results.get(name)
    if not isinstance(found, dict) or "error" in found or "skipped" in found:
        return None
    return found
