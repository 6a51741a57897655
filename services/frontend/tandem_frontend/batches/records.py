"""A batch: its description with OpenAI's names, its states, and what running it needs.

Pure. `store` keeps it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from tandem.domain.quota import NO_QUOTA, Quota

WINDOW, WINDOW_S = "24h", 86_400


class Status(StrEnum):
    """The states of a batch, as OpenAI names them."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})
NEXT: dict[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset({Status.IN_PROGRESS, Status.FAILED, Status.CANCELLED, Status.EXPIRED}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING}),
    # Back to the rows where a loss of power has taken some of their results.
    Status.FINALIZING: frozenset({Status.IN_PROGRESS, Status.COMPLETED, Status.CANCELLED, Status.EXPIRED}),
}
"""What follows a state. `cancelling` is no state of the description: the batch was cancelled, and has not ended."""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a batch has failed: an error of one line of its input, or of all of it."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch. Times are seconds since the Unix epoch."""

    id: str
    tenant: str
    quota: Quota = NO_QUOTA
    """Of the tenant when it created the batch."""
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    status: Status = Status.VALIDATING
    metadata: dict[str, str] | None = None
    output_expires_s: float | None = None
    errors: tuple[RowError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    times: dict[str, int] = field(default_factory=dict)
    """By status, when it was entered."""
    cancelling_at: int | None = None
    """Not stored: read from the mark that cancels a batch."""

    @property
    def has_ended(self) -> bool:
        """Whether it changes no more."""
        return self.status in ENDED

    def entering(self, status: Status, now_s: float, **changes: Any) -> Batch:
        """The same batch in another state."""
        assert status is self.status or status in NEXT.get(self.status, ()), f"{self.status} -> {status}"
        times = self.times if status is self.status else {**self.times, status.value: int(now_s)}
        return replace(self, status=status, times=times, **changes)

    def stored(self) -> dict[str, Any]:
        """What is written to disk."""
        return {**asdict(self), "cancelling_at": None}

    @classmethod
    def read(cls, value: dict[str, Any], cancelling_at: int | None) -> Batch:
        """The inverse of `stored`. `cancelling_at`: when it was cancelled; None: it was not."""
        errors = tuple(RowError(**error) for error in value["errors"])
        known = {**value, "status": Status(value["status"]), "quota": Quota(**value["quota"]), "errors": errors}
        return cls(**{**known, "cancelling_at": cancelling_at})

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        is_cancelling = self.cancelling_at is not None and not self.has_ended
        errors = {"object": "list", "data": [asdict(error) for error in self.errors]} if self.errors else None
        moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": WINDOW,
            "status": (Status.CANCELLING if is_cancelling else self.status).value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "cancelling_at": self.cancelling_at,
            **{f"{moment}_at": self.times.get(moment) for moment in moments},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }
