"""The membership view and its changes, as every backend publishes them.

Values only. `leases` or a backend decides what is in a view; `view_messages` puts it on the wire.
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
    """Health of a member as the membership store reports it."""

    UNKNOWN = "unknown"
    PASSING = "passing"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Removed:
    """A removed member, as it last was."""

    member: Member
    reason: RemovalReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of the view. Apply `removed` first, then `upserted`."""

    revision: int
    """Of the view after this change; above the one before it."""
    upserted: tuple[Member, ...] = ()
    removed: tuple[Removed, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed(Generic[M]):
    """A member of the view, with the state of its lease."""

    member: M
    lease_age_s: float | None
    """Time since its last keep-alive; None: another replica owns the lease, or no keep-alive has arrived yet."""
    owner: str
    """Id of the registry replica that owns its lease."""
    health: Health = Health.UNKNOWN


@dataclass(frozen=True, slots=True)
class View:
    """The whole view at one revision, ordered by id."""

    registry_id: str
    """Names the sequence that `revision` counts in; revisions of different ids cannot be compared."""
    revision: int
    workers: tuple[Listed[Worker], ...] = ()
    frontends: tuple[Listed[Frontend], ...] = ()


@dataclass(frozen=True, slots=True)
class StoreLag:
    """How far the published view is behind the membership store."""

    response_age_s: float
    """Time since the store's last response."""
    index_lag: int
    """Store indexes between the published view and that response."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whether a view is live, and since when."""

    is_live: bool
    """True: it follows the membership store. False: it is the last known view."""
    since_s: float
    """Time of the last switch between the two, in seconds since the Unix epoch."""
