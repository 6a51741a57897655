"""The state of one request over all its attempts, driven by what both legs say.

    queued -> dispatched -> bootstrapping -> prefilling -> transferring -> decoding -> finished
       ^                                                                      |
       +---- another attempt, from every state but the last two --------------+      aborted, from every state

Pure: events come in, a phase comes out, and an event that cannot be is an assertion. Owns no leg and decides nothing;
an attempt may skip states that its engines do not tell of, and never goes back within one attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Where a request, or one leg of it, is."""

    QUEUED = "queued"
    """Waits in the frontend for a place or for another attempt."""
    DISPATCHED = "dispatched"
    """Its legs are on their way to their workers."""
    BOOTSTRAPPING = "bootstrapping"
    """Both workers have their legs; the legs are finding each other, or nothing more has been heard."""
    PREFILLING = "prefilling"
    """The prompt runs through the model."""
    TRANSFERRING = "transferring"
    """The first token is known; KV is on its way."""
    DECODING = "decoding"
    """Tokens are coming."""
    FINISHED = "finished"
    ABORTED = "aborted"

    @property
    def is_last(self) -> bool:
        """Nothing can follow."""
        return self in (Phase.FINISHED, Phase.ABORTED)


class LegRole(Enum):
    """Which leg of an attempt."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


ORDER = tuple(Phase)
IN_ATTEMPT = ORDER[ORDER.index(Phase.DISPATCHED) : ORDER.index(Phase.DECODING) + 1]


@dataclass(slots=True)
class LegState:
    """One leg of the present attempt."""

    role: LegRole
    phase: Phase = Phase.DISPATCHED

    @property
    def is_taken(self) -> bool:
        """Its worker has it."""
        return self.phase is not Phase.DISPATCHED

    def advance(self, phase: Phase) -> None:
        """Go on to a later phase; word of an earlier one, which may overtake it, changes nothing."""
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
        """The legs of another attempt have been sent."""
        self._must_be(Phase.QUEUED)
        assert set(roles) in ({LegRole.AGGREGATED}, {LegRole.PREFILL, LegRole.DECODE}), f"no attempt has legs {roles}"
        self.attempt += 1
        self.legs = {role: LegState(role) for role in roles}
        self.phase = Phase.DISPATCHED

    def take(self, role: LegRole) -> None:
        """A worker has taken its leg."""
        leg = self._leg(role)
        assert not leg.is_taken, f"the {role.value} leg was taken twice"
        leg.advance(Phase.PREFILLING if role is LegRole.AGGREGATED else Phase.BOOTSTRAPPING)
        self._follow()

    def speak(self, role: LegRole) -> None:
        """The first token of a leg has come."""
        leg = self._taken(role)
        leg.advance(Phase.TRANSFERRING if role is LegRole.PREFILL else Phase.DECODING)
        self._follow()

    def end_leg(self, role: LegRole) -> None:
        """A leg has finished well."""
        self._taken(role).advance(Phase.FINISHED)
        self._follow()

    def requeue(self) -> None:
        """The attempt is over without an end of the request; both legs have been cancelled."""
        assert self.phase in IN_ATTEMPT, f"no attempt runs in {self.phase.value}"
        self.legs = {}
        self.phase = Phase.QUEUED

    def finish(self) -> None:
        """The client has its finish."""
        assert self.phase in IN_ATTEMPT, f"a request cannot finish in {self.phase.value}"
        self.legs = {}
        self.phase = Phase.FINISHED

    def abort(self) -> None:
        """The request ends without a finish: an error, or a client that is gone."""
        assert not self.phase.is_last, f"a request that is {self.phase.value} cannot be aborted"
        self.legs = {}
        self.phase = Phase.ABORTED

    def _follow(self) -> None:
        """The request is where its slower leg is, until decode speaks: from there on decode's word counts."""
        assert self.phase in IN_ATTEMPT, f"a leg spoke in {self.phase.value}"
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
        assert leg.is_taken, f"the {role.value} leg spoke before it was taken"
        return leg

    def _must_be(self, phase: Phase) -> None:
        assert self.phase is phase, f"must be {phase.value}, is {self.phase.value}"
