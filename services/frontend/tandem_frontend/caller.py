"""Who asks, and until when: what every door takes from a call before the request goes on.

The tenant is what the edge says of a caller whose key it knows; clients that come without an edge are trusted to name
theirs, or are one tenant together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.runtime.clock import Clock, monotonic

TENANT_HEADER = "x-client-id"
TENANT_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class Caller:
    """One call's caller."""

    tenant: str = ""
    deadline_s: float | None = None
    """On `clock`; None: the caller waits for ever."""
    clock: Clock = monotonic

    def left_s(self) -> float | None:
        """What is left of the deadline; None: there is none."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - self.clock())


def caller_of(context: Any, clock: Clock = monotonic) -> Caller:
    """The caller of a gRPC call (a grpc.aio.ServicerContext)."""
    left_s = context.time_remaining()
    tenant = dict(context.invocation_metadata() or ()).get(TENANT_HEADER, "")
    return Caller(
        tenant=str(tenant)[:TENANT_CHARS_MAX],
        deadline_s=None if left_s is None else clock() + left_s,
        clock=clock,
    )
