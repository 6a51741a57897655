"""The identity of one process of a frontend, and the socket paths of the others.

The parent sends it to each child as JSON.
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
    """The frontend's id in the registry."""
    address: str
    """host:port of the frontend."""
    directory: str
    """Directory of the sockets, accessible only to processes of this frontend."""

    @classmethod
    def parsed(cls, fields: Mapping[str, Any]) -> ProcessIdentity:
        """The inverse of `as_dict`."""
        return cls(**fields)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @property
    def instance(self) -> str:
        """The name of this process in traces, pushed metrics and step streams."""
        return f"{self.frontend_id}/{self.number}"

    @property
    def rpc_path(self) -> Path:
        """Its socket for siblings."""
        return rpc_path(Path(self.directory), self.number)

    @property
    def metrics_path(self) -> Path:
        """Its socket from which the parent reads metrics."""
        return metrics_path(Path(self.directory), self.number)

    @property
    def sibling_paths(self) -> dict[int, Path]:
        """The sockets of the other processes, by number."""
        others = (number for number in range(self.count) if number != self.number)
        return {number: rpc_path(Path(self.directory), number) for number in others}


def rpc_path(directory: Path, number: int) -> Path:
    """A process's socket for siblings. Short, because a socket's path has 107 bytes at most."""
    return directory / f"{number}.rpc"


def metrics_path(directory: Path, number: int) -> Path:
    """A process's socket from which the parent reads metrics."""
    return directory / f"{number}.http"
