"""The view and its steps, as every place that keeps membership tells them.

Values only. Who decides what is in a view is `membership` or a backend; how it travels is the servicer's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import Worker

M = TypeVar("M", bound=Member)


class RemovalReason(Enum):
    """Why a member left the view."""

    DEREGISTERED = "deregistered"
    LEASE_EXPIRED = "lease_expired"
    REPLACED = "replaced"


class Health(Enum):
    """What the place where membership is kept says of a member's health."""

    UNKNOWN = "unknown"
    PASSING = "passing"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Removed:
    """A member that left, as it was."""

    member: Member
    reason: RemovalReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step of the view. What was removed goes first, then what came or changed."""

    revision: int
    """Of the view after this step; above the one before it."""
    upserted: tuple[Member, ...] = ()
    removed: tuple[Removed, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed(Generic[M]):
    """A member of the view, and what is known of its lease."""

    member: M
    lease_age_s: float | None
    """Time since its last sign of life; None: another replica keeps its lease, or nobody has heard one yet."""
    keeper: str
    """Id of the replica that keeps its lease."""
    health: Health = Health.UNKNOWN


@dataclass(frozen=True, slots=True)
class View:
    """The whole view at one revision, ordered by id."""

    registry_id: str
    """Names whoever counts the revisions."""
    revision: int
    workers: tuple[Listed[Worker], ...] = ()
    frontends: tuple[Listed[Frontend], ...] = ()


@dataclass(frozen=True, slots=True)
class Followed:
    """How a place elsewhere is followed."""

    answer_age_s: float
    """Time since its last answer."""
    index_lag: int
    """By how many of its steps the view that is told is behind that answer."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a view comes from."""

    is_live: bool
    """Whether from where membership is kept, now; else from there when it was last heard of."""
    since_s: float
    """Since when, in seconds since the Unix epoch."""
