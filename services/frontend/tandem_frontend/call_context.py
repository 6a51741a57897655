"""Who asks, and until when: what every door takes from a call before the request goes on.

The tenant is what the edge says of a caller whose key it knows; clients that come without an edge are trusted to name
theirs, or are one tenant together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.clock import Clock, SteadyTime, monotonic
from tandem.observability.trace_context import TraceContext, parsed

TENANT_HEADER = "x-client-id"
TENANT_CHARS_MAX = 128
CALL_ID_HEADER = "x-request-id"
"""Given to every call by the edge, and told to HTTP's clients."""
CALL_ID_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class Caller:
    """One call's caller."""

    tenant: str = ""
    deadline_s: float | None = None
    """On `clock`; None: the caller waits for ever."""
    clock: Clock = monotonic
    operation: str = "generate"
    """What the door is called in records: generate, chat, text_completion."""
    call_id: str = ""
    """What the edge calls this call; several requests may come of it."""
    time: SteadyTime = field(default_factory=SteadyTime)
    """The time of day for all that is told of the request; began when the call came."""
    trace: TraceContext | None = None
    """The span it comes from."""

    def left_s(self) -> float | None:
        """What is left of the deadline; None: there is none."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - self.clock())


def caller_of(context: Any, operation: str = "generate", clock: Clock = monotonic) -> Caller:
    """The caller of a gRPC call (a grpc.aio.ServicerContext)."""
    left_s = context.time_remaining()
    metadata = dict(context.invocation_metadata() or ())
    tenant = metadata.get(TENANT_HEADER, "")
    return Caller(
        tenant=str(tenant)[:TENANT_CHARS_MAX],
        deadline_s=None if left_s is None else clock() + left_s,
        clock=clock,
        operation=operation,
        call_id=str(metadata.get(CALL_ID_HEADER, ""))[:CALL_ID_CHARS_MAX],
        trace=parsed(metadata),
    )
