"""A frontend as a member of the registry: its identity, epoch and address.

Pure value types; nothing about requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.domain.worker import Worker, WorkerState, id_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """One incarnation of a frontend process, as the registry lists it."""

    kind: ClassVar[str] = "frontend"

    frontend_id: str
    """Stable across restarts, for example "frontend-0"."""
    epoch: int
    """Increases with every start of the frontend."""
    address: str
    """host:port of its gRPC server."""
    model: str
    """The model name clients request."""
    state: WorkerState = WorkerState.SERVING
    release: str = ""
    """Tandem release it runs; empty: unknown."""

    @property
    def member_id(self) -> str:
        """`frontend_id`, under the name that all kinds of members share."""
        return self.frontend_id


Member = Worker | Frontend
"""A holder of a lease in the registry. Ids are unique within a kind, addresses within a cluster."""


def default_frontend_id(address: str) -> str:
    """Id of a frontend for which none is configured: kind and address."""
    return id_at(Frontend.kind, address)
