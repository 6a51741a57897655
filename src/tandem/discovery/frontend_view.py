"""The frontends as a watcher of the registry holds them: merges whole lists, and outlives a registry.

Pure: the clock is given, nothing is awaited. Owns the rule that a list proves an absence only when it follows the one
before at the same registry; and that the last frontend is never given up: who is dead is for health checks to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.clock import Clock
from tandem.discovery.view import CONFIRM_GRACE_S
from tandem.domain.frontend import Frontend


@dataclass(frozen=True, slots=True)
class _Entry:
    frontend: Frontend
    drop_s: float | None = None
    """Unconfirmed: when to give it up. None: the present registry lists it."""

    def unconfirmed(self, drop_s: float) -> _Entry:
        """The same, unconfirmed; who is so already gets no new time."""
        return _Entry(self.frontend, drop_s) if self.drop_s is None else self


class FrontendView:
    """Frontends by id, confirmed by the present registry or remembered from the one before."""

    def __init__(self, clock: Clock, confirm_grace_s: float = CONFIRM_GRACE_S) -> None:
        self.registry_id: str | None = None
        self.revision = 0
        self._clock = clock
        self._confirm_grace_s = confirm_grace_s
        self._entries: dict[str, _Entry] = {}

    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, confirmed or not, ordered by id."""
        return tuple(self._entries[frontend_id].frontend for frontend_id in sorted(self._entries))

    def apply(self, registry_id: str, revision: int, frontends: Iterable[Frontend]) -> bool:
        """Take a whole list. Returns whether it is believed: an empty one after a full one is not, and is dropped."""
        listed = {frontend.frontend_id: frontend for frontend in frontends}
        if not listed and self._entries:
            return False
        is_older = registry_id == self.registry_id and revision < self.revision
        proves_absence = registry_id == self.registry_id and not is_older
        drop_s = self._clock() + self._confirm_grace_s
        addresses = {frontend.address for frontend in listed.values()}
        entries = {frontend_id: _Entry(frontend) for frontend_id, frontend in listed.items()}
        for frontend_id, known in self._entries.items():
            if frontend_id in listed:
                if is_older and known.frontend.epoch > listed[frontend_id].epoch:
                    entries[frontend_id] = known.unconfirmed(drop_s)
            elif known.frontend.address not in addresses and not (proves_absence and known.drop_s is None):
                entries[frontend_id] = known.unconfirmed(drop_s)
        self.registry_id, self.revision, self._entries = registry_id, revision, entries
        return True

    def drop_overdue(self) -> bool:
        """Give up who was not confirmed in time; whether anyone was."""
        now_s = self._clock()
        kept = {key: entry for key, entry in self._entries.items() if entry.drop_s is None or now_s < entry.drop_s}
        changed, self._entries = len(kept) < len(self._entries), kept
        return changed

    def next_drop_s(self) -> float | None:
        """When to call `drop_overdue`; None while everybody is confirmed."""
        return min((entry.drop_s for entry in self._entries.values() if entry.drop_s is not None), default=None)
