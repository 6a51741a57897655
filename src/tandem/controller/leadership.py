"""Leadership of one controller among several: asked for at a registry again and again, and believed for half as long.

Owns the term, and until when it may be acted on.
"""

from __future__ import annotations

import logging

from tandem.client.role_calls import Leading, campaign
from tandem.clock import Clock, monotonic
from tandem.errors import TandemError
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

BELIEVED = 0.5
"""Share of the time to live for which a leader acts: the rest is for the way of a call."""


class Leadership:
    """One candidate of one election."""

    def __init__(self, candidate_id: str, tls: Tls | None, clock: Clock = monotonic) -> None:
        self.candidate_id = candidate_id
        self._tls = tls
        self._clock = clock
        self._leading: Leading | None = None
        self._until_s = 0.0

    @property
    def leading(self) -> Leading | None:
        """The term in which this process may act now; None: it does not lead."""
        return self._leading if self._clock() < self._until_s else None

    async def ask(self, registry: str, election: str) -> None:
        """Ask to lead, or to go on leading. A registry that does not respond changes nothing: the time runs out."""
        asked_s = self._clock()
        try:
            response = await campaign(registry, election, self.candidate_id, tls=self._tls)
        except TandemError as problem:
            log.warning("cannot ask registry %s who leads: %s", registry, problem)
            return
        was = self.leading
        if response.leader_id != self.candidate_id:
            self._leading = None
            if was is not None:
                log.warning("leads no more: %s leads, term %d", response.leader_id or "no candidate", response.term)
            return
        self._leading = Leading(election=election, term=response.term)
        self._until_s = asked_s + BELIEVED * response.time_to_live.ToNanoseconds() / 1e9
        if was is None or was.term != response.term:
            log.info("leads, term %d", response.term)

    async def resign(self, registry: str) -> None:
        """Give up leading, so that another controller need not wait."""
        leading, self._leading = self._leading, None
        if leading is not None:
            try:
                await campaign(registry, leading.election, self.candidate_id, resign=True, tls=self._tls)
            except TandemError as problem:
                log.warning("another controller leads once the time to live is over: %s", problem)
