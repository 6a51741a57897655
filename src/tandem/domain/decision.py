"""The reasons of a controller's decisions. Pure data."""

from __future__ import annotations

from enum import StrEnum


class Why(StrEnum):
    """Why a role is changed, or why none is."""

    CHANGE = "change"
    """A worker should take another role."""
    STALE_VIEW = "stale_view"
    """The registry's view is the last known one."""
    NO_FIGURES = "no_figures"
    """Some worker or frontend reports no load, or the window is too short yet."""
    IN_PROGRESS = "in_progress"
    """A worker drains or changes its role: one step at a time."""
    NO_PAIR = "no_pair"
    """There is no prefill or no decode worker."""
    WITHIN = "within"
    """The roles fit the load."""
    NO_GAIN = "no_gain"
    """Another split would not help."""
    LAST_WORKER = "last_worker"
    """The role that has workers to spare has one worker."""
    CANNOT_TAKE = "cannot_take"
    """No worker can take the wanted role now."""
    UNCONFIRMED = "unconfirmed"
    """A change has not been wanted for long enough."""
    SETTLING = "settling"
    """The last change was a moment ago."""
    REVERSAL = "reversal"
    """The change would reverse the last one, too early."""
    DRY_RUN = "dry_run"
    """A worker should take another role, and a dry run changes nothing."""
