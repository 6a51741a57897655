"""W3C trace context: the trace a request belongs to, and the parent span of the next hop.

Pure. Owns the header format, and sampling of requests for which the caller has not decided; creates no spans.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
STATE_CHARS_MAX = 512
"""A longer tracestate is dropped, as the specification allows."""
_STATE = re.compile(rf"[ -~]{{0,{STATE_CHARS_MAX}}}")
"""Printable ASCII: with anything else in its metadata gRPC fails the whole call."""
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_RATIO_BITS = 64
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace."""

    trace_id: int
    span_id: int
    is_sampled: bool = True
    state: str = ""
    """tracestate, forwarded unchanged."""

    @property
    def trace_hex(self) -> str:
        """Trace id as 32 hex digits."""
        return f"{self.trace_id:032x}"

    def headers(self) -> Headers:
        """HTTP headers or gRPC metadata that make this span the parent of the next hop."""
        traceparent = f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"
        return ((TRACEPARENT, traceparent), (TRACESTATE, self.state)) if self.state else ((TRACEPARENT, traceparent),)


def headers_of(context: TraceContext | None) -> Headers:
    """The headers of a context; empty for None."""
    return () if context is None else context.headers()


def parsed(headers: Mapping[str, object]) -> TraceContext | None:
    """The context sent by a caller; None: absent or malformed."""
    given = headers.get(TRACEPARENT)
    found = _TRACEPARENT.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # Version 00 has exactly four parts, later versions may have more. Version ff and all-zero ids are invalid.
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    state = str(headers.get(TRACESTATE, ""))
    return TraceContext(
        trace_id=int(trace_id, 16),
        span_id=int(span_id, 16),
        is_sampled=bool(int(flags, 16) & _SAMPLED),
        state=state if _STATE.fullmatch(state) else "",
    )


def caller_span(context: Any) -> TraceContext | None:
    """The caller's span of a gRPC call (context: a grpc.aio.ServicerContext); None: not sent."""
    return parsed(dict(context.invocation_metadata() or ()))


class TraceIds:
    """Creates span and trace ids. The caller's sampling decision is kept; without one the ratio decides by trace id."""

    def __init__(self, sample_ratio: float, rng: random.Random) -> None:
        self._sampled_below = int(sample_ratio * 2**_RATIO_BITS)
        self._rng = rng

    def span_id(self) -> int:
        """A new span id."""
        return self._rng.getrandbits(64) or 1

    def child(self, parent: TraceContext | None) -> TraceContext:
        """A new span below `parent`, or the first one of a new trace."""
        span_id = self.span_id()
        if parent is not None:
            return TraceContext(parent.trace_id, span_id, parent.is_sampled, parent.state)
        trace_id = self._rng.getrandbits(128) or 1
        return TraceContext(trace_id, span_id, trace_id % 2**_RATIO_BITS < self._sampled_below)
