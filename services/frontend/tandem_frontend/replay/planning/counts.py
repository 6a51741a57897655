"""How many workers of each role a candidate fleet has. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tandem_frontend.replay.fleet_file import FleetFile

ROLES = ("prefill", "decode", "aggregated")


@dataclass(frozen=True, slots=True, order=True)
class Counts:
    """Workers by role. Prefill and decode workers serve in pairs: either both are 0 or none is."""

    prefill: int = 0
    decode: int = 0
    aggregated: int = 0

    @classmethod
    def of(cls, fleet: FleetFile) -> Counts:
        """Those of a fleet file."""
        return cls(fleet.prefill.count, fleet.decode.count, fleet.aggregated.count)

    @property
    def total(self) -> int:
        """All workers."""
        return self.prefill + self.decode + self.aggregated

    @property
    def is_possible(self) -> bool:
        """Whether such a fleet can serve."""
        return min(self.prefill, self.decode, self.aggregated) >= 0 and (
            (self.prefill > 0) == (self.decode > 0) and self.total > 0
        )

    def smaller(self) -> Iterator[Counts]:
        """The fleets with one worker fewer that can serve."""
        for role in ROLES:
            fewer: Counts = replace(self, **{role: getattr(self, role) - 1})
            if fewer.is_possible:
                yield fewer

    def missing(self, fewer: Counts) -> str:
        """The role of which `fewer`, one of `smaller()`, has one worker less."""
        return next(role for role in ROLES if getattr(self, role) > getattr(fewer, role))

    def fleet(self, fleet: FleetFile) -> FleetFile:
        """The fleet with these counts, all else as in `fleet`."""
        sections = {role: getattr(fleet, role).model_copy(update={"count": getattr(self, role)}) for role in ROLES}
        return fleet.model_copy(update=sections)

    def __str__(self) -> str:
        return " + ".join(f"{getattr(self, role)} {role}" for role in ROLES if getattr(self, role))
