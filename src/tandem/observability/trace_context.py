"""W3C trace context: which trace a request belongs to, and which span of it caused what comes next.

Pure. Owns the header's form and the sampling of requests that nobody has decided about; makes no spans.
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
"""Printable ASCII: gRPC refuses to send anything else on, and with it the whole call."""
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
    """Vendors' own entries, passed on as they came."""

    @property
    def trace_hex(self) -> str:
        """The trace's id as everybody writes it."""
        return f"{self.trace_id:032x}"

    def headers(self) -> Headers:
        """What tells the next hop that this span is its parent; also gRPC metadata."""
        traceparent = f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"
        return ((TRACEPARENT, traceparent), (TRACESTATE, self.state)) if self.state else ((TRACEPARENT, traceparent),)


def headers_of(context: TraceContext | None) -> Headers:
    """The headers of a context; none where there is none."""
    return () if context is None else context.headers()


def parsed(headers: Mapping[str, object]) -> TraceContext | None:
    """The context a caller sent; None when there is none, or none that can be read."""
    given = headers.get(TRACEPARENT)
    found = _TRACEPARENT.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # Version 00 has four parts; a later one may have more. ff is no version, and ids of zeroes are none.
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
    """The span a gRPC call comes from (context: a grpc.aio.ServicerContext); None when the caller told of none."""
    return parsed(dict(context.invocation_metadata() or ()))


class TraceIds:
    """Ids of new spans. A caller's decision to sample holds; where there is none, the ratio decides by the trace id."""

    def __init__(self, sample_ratio: float, rng: random.Random) -> None:
        self._sampled_below = int(sample_ratio * 2**_RATIO_BITS)
        self._rng = rng

    def span_id(self) -> int:
        """Of a span whose trace is known."""
        return self._rng.getrandbits(64) or 1

    def child(self, parent: TraceContext | None) -> TraceContext:
        """A new span below `parent`, or the first one of a new trace."""
        span_id = self.span_id()
        if parent is not None:
            return TraceContext(parent.trace_id, span_id, parent.is_sampled, parent.state)
        trace_id = self._rng.getrandbits(128) or 1
        return TraceContext(trace_id, span_id, trace_id % 2**_RATIO_BITS < self._sampled_below)
