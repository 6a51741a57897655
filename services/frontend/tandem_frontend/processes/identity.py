"""Which of a frontend's processes this is, and where the others are found.

The parent sends it to each of its children, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """One process of a frontend."""

    number: int
    """From 0."""
    count: int
    frontend_id: str
    """Of the frontend, in the registry."""
    address: str
    """host:port of the frontend."""
    directory: str
    """That only processes of this frontend can enter."""

    @classmethod
    def parsed(cls, fields: Mapping[str, Any]) -> ProcessIdentity:
        """From what `as_dict` gave."""
        return cls(**fields)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def instance(self) -> str:
        """The name of this process in traces, pushed metrics and step streams."""
        return f"{self.frontend_id}/{self.number}"

    @property
    def rpc_path(self) -> Path:
        """Where it answers its siblings."""
        return rpc_path(Path(self.directory), self.number)

    @property
    def metrics_path(self) -> Path:
        """Where it is scraped by its parent."""
        return metrics_path(Path(self.directory), self.number)

    @property
    def sibling_paths(self) -> dict[int, Path]:
        """Where each of the others answers."""
        others = (number for number in range(self.count) if number != self.number)
        return {number: rpc_path(Path(self.directory), number) for number in others}


def rpc_path(directory: Path, number: int) -> Path:
    """Where a process answers its siblings. Short: the path of a socket has 107 bytes at most."""
    return directory / f"{number}.rpc"


def metrics_path(directory: Path, number: int) -> Path:
    """Where a process is scraped by its parent."""
    return directory / f"{number}.http"
