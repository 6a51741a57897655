"""The caller of a request: tenant, deadline, call id and trace context, as every endpoint reads them from a call.

The edge sets the tenant of a caller whose API key it knows. Clients that connect without an edge are trusted to name
their tenant; without a name they share one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.clock import Clock, SteadyTime, monotonic
from tandem.observability.trace_context import TraceContext, parsed

TENANT_HEADER = "x-client-id"
TENANT_CHARS_MAX = 128
CALL_ID_HEADER = "x-request-id"
"""Set by the edge for every call, and returned to HTTP clients."""
CALL_ID_CHARS_MAX = 128
SESSION_HEADER = "x-session-id"
"""Default of the setting `session_header`."""
SESSION_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of one call."""

    tenant: str = ""
    session: str = ""
    """Its session, for routing; empty: none is named."""
    deadline_s: float | None = None
    """On `clock`; None: no deadline."""
    clock: Clock = monotonic
    operation: str = "generate"
    """The endpoint's name in traces and metrics: generate, chat, text_completion."""
    call_id: str = ""
    """The edge's id of this call, which may create several requests."""
    time: SteadyTime = field(default_factory=SteadyTime)
    """Wall clock of all times recorded for the request; started when the call arrived."""
    trace: TraceContext | None = None
    """The parent span."""

    def left_s(self) -> float | None:
        """Seconds left until the deadline; None: no deadline."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - self.clock())


def caller_of(
    context: Any, operation: str = "generate", clock: Clock = monotonic, session_header: str = SESSION_HEADER
) -> Caller:
    """The caller of a gRPC call (a grpc.aio.ServicerContext)."""
    left_s = context.time_remaining()
    metadata = dict(context.invocation_metadata() or ())
    tenant = metadata.get(TENANT_HEADER, "")
    return Caller(
        tenant=str(tenant)[:TENANT_CHARS_MAX],
        session=str(metadata.get(session_header, ""))[:SESSION_CHARS_MAX],
        deadline_s=None if left_s is None else clock() + left_s,
        clock=clock,
        operation=operation,
        call_id=str(metadata.get(CALL_ID_HEADER, ""))[:CALL_ID_CHARS_MAX],
        trace=parsed(metadata),
    )
