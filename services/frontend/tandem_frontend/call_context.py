"""The caller of a request: tenant, deadline, call id and trace context, as every endpoint reads them from a call.

The edge sets the tenant and quota of a caller whose API key it knows, and the address of every caller. Clients that
connect without an edge are trusted to name them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tandem.clock import Clock, SteadyTime, monotonic
from tandem.domain.quota import NO_QUOTA, Quota, QuotaError, read_client_header
from tandem.errors import InvalidRequest
from tandem.observability.trace_context import TraceContext, parsed
from tandem_frontend.call_usage import CallUsage

TENANT_HEADER = "x-client-id"
"""The tenant, and its quota as `tandem.domain.quota` writes it."""
TENANT_CHARS_MAX = 128
ADDRESS_HEADER = "x-client-address"
"""IP address of the edge's client, set by the edge for every call."""
IPV6_PREFIX_BITS = 64
"""One subscriber has at least so large a network, and may choose any address in it."""
EDGE_BEGIN_HEADER = "x-request-start"
"""When the edge received the call: "t=" and seconds since the Unix epoch, as other proxies send it too. Set by the edge
for every call."""
EDGE_AGE_S_MAX = 3_600.0
"""What is further from the frontend's clock is no time of this call."""
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
    fairness_id: str = ""
    """Whose share of this frontend it uses: the tenant, or without one the client's address. Never recorded."""
    quota: Quota = NO_QUOTA
    """Of the tenant."""
    session: str = ""
    """Its session, for routing; empty: none is named."""
    deadline_s: float | None = None
    """On `clock`; None: no deadline."""
    clock: Clock = monotonic
    operation: str = "generate"
    """The endpoint's name in traces and metrics: generate, chat, text_completion, embeddings."""
    call_id: str = ""
    """The edge's id of this call, which may create several requests."""
    time: SteadyTime = field(default_factory=SteadyTime)
    """Wall clock of all times recorded for the request; started when the call arrived."""
    edge_begin_s: float | None = None
    """When the edge received the call, on the edge's clock; None: no edge forwarded it."""
    trace: TraceContext | None = None
    """The parent span."""
    is_background: bool = False
    """Whether it runs at low priority, on capacity that live requests leave."""
    usage: CallUsage = field(default_factory=CallUsage)
    """Collects what its generations use."""

    def left_s(self) -> float | None:
        """Seconds left until the deadline; None: no deadline."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - self.clock())


def caller_of(
    context: Any, operation: str = "generate", clock: Clock = monotonic, session_header: str = SESSION_HEADER
) -> Caller:
    """The caller of a gRPC call (a grpc.aio.ServicerContext).

    Raises:
        InvalidRequest: the name of its tenant is too long, or its quota is malformed. No edge sends such.
    """
    left_s = context.time_remaining()
    metadata = dict(context.invocation_metadata() or ())
    tenant, quota = _tenant_of(str(metadata.get(TENANT_HEADER, "")))
    fairness_id = tenant or _address_of(str(metadata.get(ADDRESS_HEADER, "")) or _host(context.peer()))
    context.count_unread_for(fairness_id)
    time = SteadyTime()
    return Caller(
        tenant=tenant,
        fairness_id=fairness_id,
        quota=quota,
        session=str(metadata.get(session_header, ""))[:SESSION_CHARS_MAX],
        deadline_s=None if left_s is None else clock() + left_s,
        clock=clock,
        operation=operation,
        call_id=str(metadata.get(CALL_ID_HEADER, ""))[:CALL_ID_CHARS_MAX],
        time=time,
        edge_begin_s=_edge_begin(str(metadata.get(EDGE_BEGIN_HEADER, "")), time.begin_time_s),
        trace=parsed(metadata),
    )


def _tenant_of(header: str) -> tuple[str, Quota]:
    try:
        tenant, quota = read_client_header(header)
    except QuotaError as problem:
        raise InvalidRequest(TENANT_HEADER, str(problem)) from None
    # Not cut: two tenants with the same beginning would share their caches.
    if len(tenant) > TENANT_CHARS_MAX:
        raise InvalidRequest(TENANT_HEADER, f"must be at most {TENANT_CHARS_MAX} characters long")
    return tenant, quota


def _edge_begin(text: str, now_s: float) -> float | None:
    try:
        begin_s = float(text.removeprefix("t="))
    except ValueError:
        return None
    return begin_s if abs(now_s - begin_s) <= EDGE_AGE_S_MAX else None


def _host(peer: str) -> str:
    """The IP address in a peer as gRPC spells it (ipv4:10.0.0.1:443, ipv6:[::1]:443); empty: a unix socket."""
    return peer.partition(":")[2].rpartition(":")[0].strip("[]")


def _address_of(text: str) -> str:
    """The fairness id of a client address; no client id has a colon, so that none is equal to it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return f"address:{ipaddress.ip_network((address, IPV6_PREFIX_BITS), strict=False)}"
        address = address.ipv4_mapped
    return f"address:{address}"
