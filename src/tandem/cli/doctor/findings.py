"""What `tandem doctor` reports: a finding for each thing that a part needs, with its state and how to mend it.

Owns the states and their JSON form; imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """State of one thing that a part needs."""

    OK = "ok"
    UNTESTED = "untested"
    """Present in a version that Tandem was not tested with; it may work."""
    WRONG = "wrong"
    """Present, and it cannot work as it is."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    found: str = ""
    """Version or place of what was found, or why it cannot work."""
    mend: str | None = None
    """Command or step that mends it; None: nothing to mend."""

    def __post_init__(self) -> None:
        if (self.state is State.OK) != (self.mend is None):
            raise ValueError(f"{self.name}: exactly what is not ok has a command that mends it")


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether a part with these findings can run: nothing is missing or wrong."""
    return all(finding.state in (State.OK, State.UNTESTED) for finding in findings)


def as_json(parts: dict[str, list[Finding]]) -> dict[str, Any]:
    """The report for programs: each part with `ready` and its findings."""
    return {
        "parts": {
            part: {"ready": is_ready(findings), "findings": [asdict(finding) for finding in findings]}
            for part, findings in parts.items()
        }
    }
