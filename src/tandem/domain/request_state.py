"""The state of one request over all its attempts, driven by the events of both legs.

    queued -> dispatched -> bootstrapping -> prefilling -> transferring -> decoding -> finished
       ^                                                                      |
       +---- another attempt, from every state but the last two --------------+      aborted, from every state

Pure: events come in, a phase comes out, and an impossible event is an assertion. The one place that holds the phases of
a request and of its legs. An attempt may skip phases that its engines do not report, and never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Phase of a request, or of one of its legs."""

    QUEUED = "queued"
    """Waits in the frontend for its first or for another attempt."""
    DISPATCHED = "dispatched"
    """Its legs were sent to their workers."""
    BOOTSTRAPPING = "bootstrapping"
    """Both workers have accepted their legs; the legs are connecting, or no later phase was reported."""
    PREFILLING = "prefilling"
    """The prompt is being computed."""
    TRANSFERRING = "transferring"
    """Prefill has the first token; KV is being transferred."""
    DECODING = "decoding"
    """Decode has sent a token."""
    FINISHED = "finished"
    ABORTED = "aborted"

    @property
    def is_last(self) -> bool:
        """Whether no other phase can follow."""
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
    def is_accepted(self) -> bool:
        """Whether its worker has accepted it."""
        return self.phase is not Phase.DISPATCHED

    def advance(self, phase: Phase) -> None:
        """Enter a later phase; an event of an earlier one, which may arrive late, changes nothing."""
        assert not self.phase.is_last, f"the {self.role.value} leg has ended and cannot be {phase.value}"
        if ORDER.index(phase) > ORDER.index(self.phase):
            self.phase = phase

    def abort(self) -> None:
        """It failed, or was given up."""
        assert self.phase is not Phase.FINISHED, f"the {self.role.value} leg has finished and cannot be aborted"
        self.phase = Phase.ABORTED


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

    def accept(self, role: LegRole) -> None:
        """A worker has accepted its leg."""
        leg = self._leg(role)
        assert not leg.is_accepted, f"the {role.value} leg was accepted twice"
        leg.advance(Phase.PREFILLING if role is LegRole.AGGREGATED else Phase.BOOTSTRAPPING)
        self._follow()

    def first_token(self, role: LegRole) -> None:
        """The first token of a leg has arrived."""
        leg = self._accepted(role)
        leg.advance(Phase.TRANSFERRING if role is LegRole.PREFILL else Phase.DECODING)
        self._follow()

    def end_leg(self, role: LegRole) -> None:
        """A leg has finished without a failure."""
        self._accepted(role).advance(Phase.FINISHED)
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
        """The request ends without a finish: an error, or its client has cancelled it."""
        assert not self.phase.is_last, f"a request that is {self.phase.value} cannot be aborted"
        self.legs = {}
        self.phase = Phase.ABORTED

    def _follow(self) -> None:
        """Derive the request's phase: until decode's first token from both legs, from then on from decode alone."""
        assert self.phase in IN_ATTEMPT, f"an event of a leg arrived in {self.phase.value}"
        streaming = self.legs.get(LegRole.DECODE) or self.legs[LegRole.AGGREGATED]
        if ORDER.index(streaming.phase) >= ORDER.index(Phase.DECODING):
            self.phase = Phase.DECODING
        elif all(leg.is_accepted for leg in self.legs.values()):
            furthest = max((leg.phase for leg in self.legs.values()), key=ORDER.index)
            phase = min(furthest, Phase.TRANSFERRING, key=ORDER.index)
            self.phase = max(self.phase, phase, key=ORDER.index)

    def _leg(self, role: LegRole) -> LegState:
        assert role in self.legs, f"this attempt has no {role.value} leg"
        return self.legs[role]

    def _accepted(self, role: LegRole) -> LegState:
        leg = self._leg(role)
        assert leg.is_accepted, f"an event of the {role.value} leg arrived before it was accepted"
        return leg

    def _must_be(self, phase: Phase) -> None:
        assert self.phase is phase, f"phase must be {phase.value}, is {self.phase.value}"
