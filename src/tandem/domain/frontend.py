"""What a frontend is, as the registry lists it.

Owns identity and place of one start of a frontend. What it does for a request is the frontend's own business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.domain.worker import Worker, WorkerState, id_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """One start of one frontend process, as the registry lists it."""

    kind: ClassVar[str] = "frontend"

    frontend_id: str
    """Stable over restarts, for example "frontend-0"."""
    epoch: int
    """Grows with every start of the frontend."""
    address: str
    """host:port of its gRPC server."""
    model: str
    """The name clients ask for."""
    state: WorkerState = WorkerState.SERVING
    release: str = ""
    """Release of Tandem it runs; empty: unknown."""

    @property
    def member_id(self) -> str:
        """Its id, under the name that is common to all members."""
        return self.frontend_id


Member = Worker | Frontend
"""Whoever holds a lease. Ids are unique within one kind, addresses within a cluster."""


def default_frontend_id(address: str) -> str:
    """The name of a frontend that was given none."""
    return id_at(Frontend.kind, address)
