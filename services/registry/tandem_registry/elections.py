"""Elections: which of several candidates leads, in the memory of one registry.

Pure but for the clock. Owns the rules that every backend shares: a leader that has not asked again within the time to
live has ended, and each other leader begins a later term.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.clock import Clock

ELECTIONS_MAX = 1024
LEASES = 3
"""The time to live of a leader, in those of a member's lease: a change of leader is rare."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """Who leads an election."""

    leader_id: str
    """Empty: no candidate."""
    term: int


class Elections:
    """All elections of this process."""

    def __init__(self, ttl_s: float, clock: Clock, first_term: int) -> None:
        """`first_term`: above all those that an earlier process gave, such as milliseconds since the Unix epoch.

        The leader of an earlier process may still believe that it leads: a role change with its term is refused.
        """
        self.ttl_s = ttl_s
        self._clock = clock
        self._term = first_term
        self._leaders: dict[str, tuple[Leadership, float]] = {}
        """Each with its end, as of now."""

    def campaign(self, election: str, candidate_id: str, *, resign: bool = False) -> Leadership:
        """Ask to lead. Returns who leads now."""
        present = self.leader(election)
        if present is None:
            if resign or len(self._leaders) >= ELECTIONS_MAX:
                return Leadership("", 0)
            self._term += 1
            present = Leadership(candidate_id, self._term)
        if present.leader_id != candidate_id:
            return present
        if resign:
            del self._leaders[election]
            return Leadership("", present.term)
        self._leaders[election] = present, self._clock() + self.ttl_s
        return present

    def leader(self, election: str) -> Leadership | None:
        """Who leads; None: no candidate."""
        now_s = self._clock()
        self._leaders = {name: one for name, one in self._leaders.items() if one[1] > now_s}
        found = self._leaders.get(election)
        return None if found is None else found[0]
