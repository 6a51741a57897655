"""The state of one request over all its attempts, driven by the reports of both legs.

    queued -> dispatched -> bootstrapping -> prefilling -> transferring -> decoding -> finished
       ^                                                                      |
       +---- another attempt, from every state but the last two --------------+      aborted, from every state

Pure: events in, a phase out; an impossible event is an assertion. Owns no leg and decides nothing. An attempt may skip
states that its engines do not report, and never moves backwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Phase of a request, or of one of its legs."""

    QUEUED = "queued"
    """Queued in the frontend, for admission or for another attempt."""
    DISPATCHED = "dispatched"
    """Its legs have been sent to their workers."""
    BOOTSTRAPPING = "bootstrapping"
    """Both workers have accepted their legs; the legs are connecting, or have reported nothing more."""
    PREFILLING = "prefilling"
    """The prompt is being computed."""
    TRANSFERRING = "transferring"
    """Prefill has reported the first token; the KV transfer is not reported complete."""
    DECODING = "decoding"
    """Decode is reporting tokens."""
    FINISHED = "finished"
    ABORTED = "aborted"

    @property
    def is_last(self) -> bool:
        """Whether this is a final phase."""
        return self in (Phase.FINISHED, Phase.ABORTED)


class LegRole(Enum):
    """Role of a leg within an attempt."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


ORDER = tuple(Phase)
IN_ATTEMPT = ORDER[ORDER.index(Phase.DISPATCHED) : ORDER.index(Phase.DECODING) + 1]


@dataclass(slots=True)
class LegState:
    """One leg of the current attempt."""

    role: LegRole
    phase: Phase = Phase.DISPATCHED

    @property
    def is_taken(self) -> bool:
        """Whether its worker has accepted it."""
        return self.phase is not Phase.DISPATCHED

    def advance(self, phase: Phase) -> None:
        """Move to a later phase; a late report of an earlier phase is ignored."""
        assert not self.phase.is_last, f"the {self.role.value} leg has ended and cannot be {phase.value}"
        if ORDER.index(phase) > ORDER.index(self.phase):
            self.phase = phase


@dataclass(slots=True)
class RequestState:
    """One request."""

    phase: Phase = Phase.QUEUED
    attempt: int = 0
    legs: dict[LegRole, LegState] = field(default_factory=dict)

    def dispatch(self, *roles: LegRole) -> None:
        """The legs of a new attempt have been sent."""
        self._must_be(Phase.QUEUED)
        assert set(roles) in ({LegRole.AGGREGATED}, {LegRole.PREFILL, LegRole.DECODE}), (
            f"an attempt cannot have legs {roles}"
        )
        self.attempt += 1
        self.legs = {role: LegState(role) for role in roles}
        self.phase = Phase.DISPATCHED

    def take(self, role: LegRole) -> None:
        """A worker has accepted its leg."""
        leg = self._leg(role)
        assert not leg.is_taken, f"the {role.value} leg was accepted twice"
        leg.advance(Phase.PREFILLING if role is LegRole.AGGREGATED else Phase.BOOTSTRAPPING)
        self._follow()

    def speak(self, role: LegRole) -> None:
        """A leg has reported its first token."""
        leg = self._taken(role)
        leg.advance(Phase.TRANSFERRING if role is LegRole.PREFILL else Phase.DECODING)
        self._follow()

    def end_leg(self, role: LegRole) -> None:
        """A leg has finished without an error."""
        self._taken(role).advance(Phase.FINISHED)
        self._follow()

    def requeue(self) -> None:
        """The attempt has failed and the request continues; both legs have been cancelled."""
        assert self.phase in IN_ATTEMPT, f"no attempt is running in phase {self.phase.value}"
        self.legs = {}
        self.phase = Phase.QUEUED

    def finish(self) -> None:
        """The finish has been sent to the client."""
        assert self.phase in IN_ATTEMPT, f"a request cannot finish in phase {self.phase.value}"
        self.legs = {}
        self.phase = Phase.FINISHED

    def abort(self) -> None:
        """The request ends without a finish: an error, or the client disconnected."""
        assert not self.phase.is_last, f"a request cannot be aborted in phase {self.phase.value}"
        self.legs = {}
        self.phase = Phase.ABORTED

    def _follow(self) -> None:
        """Derive the request's phase from its legs: `decoding` as soon as decode reports a token; before that the
        furthest leg's phase, at most `transferring`, once every leg is accepted.
        """
        assert self.phase in IN_ATTEMPT, f"a leg reported in phase {self.phase.value}"
        streaming = self.legs.get(LegRole.DECODE) or self.legs[LegRole.AGGREGATED]
        if ORDER.index(streaming.phase) >= ORDER.index(Phase.DECODING):
            self.phase = Phase.DECODING
        elif all(leg.is_taken for leg in self.legs.values()):
            furthest = max((leg.phase for leg in self.legs.values()), key=ORDER.index)
            phase = min(furthest, Phase.TRANSFERRING, key=ORDER.index)
            self.phase = max(self.phase, phase, key=ORDER.index)

    def _leg(self, role: LegRole) -> LegState:
        assert role in self.legs, f"this attempt has no {role.value} leg"
        return self.legs[role]

    def _taken(self, role: LegRole) -> LegState:
        leg = self._leg(role)
        assert leg.is_taken, f"the {role.value} leg reported before it was accepted"
        return leg

    def _must_be(self, phase: Phase) -> None:
        assert self.phase is phase, f"phase must be {phase.value}, is {self.phase.value}"
