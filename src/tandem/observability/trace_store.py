"""The traces of a process: open ones, the last closed ones, and the sinks called when one closes.

Owns the mapping from exceptions to outcomes. A sink that fails is logged and does not affect the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from tandem.errors import RequestError, TandemError
from tandem.observability.logs import about
from tandem.observability.request_trace import LegTrace, RequestTrace
from tandem.observability.trace_context import TraceContext, TraceIds

log = logging.getLogger(__name__)

CLOSED_KEPT = 256

C = TypeVar("C", RequestTrace, LegTrace)


class TraceStore(Generic[C]):
    """Opens, keeps and closes traces."""

    def __init__(
        self,
        sinks: Sequence[Callable[[C], None]] = (),
        *,
        closed_kept: int = CLOSED_KEPT,
        ids: TraceIds | None = None,
    ) -> None:
        """Each sink is called once with every closed trace; `ids` is None if no spans are exported."""
        self.sinks: list[Callable[[C], None]] = list(sinks)
        self.part_sinks: list[Callable[[C], None]] = []
        """Called with the trace of each part of a request, which is neither kept nor counted as a request."""
        self.ids = ids
        self._open: dict[int, C] = {}
        self._closed: deque[C] = deque(maxlen=closed_kept)

    @property
    def open(self) -> list[C]:
        """Open traces, oldest first."""
        return list(self._open.values())

    @property
    def closed(self) -> list[C]:
        """The last closed traces, newest last."""
        return list(self._closed)

    def child(self, parent: TraceContext | None) -> TraceContext | None:
        """A new span below `parent`; if nothing is exported `parent` itself, which is then forwarded."""
        return parent if self.ids is None else self.ids.child(parent)

    @contextlib.contextmanager
    def following(self, trace: C) -> Iterator[C]:
        """Keep a trace open within the context; an exception that leaves it sets the outcome."""
        self.begin(trace)
        about.set(trace)
        try:
            yield trace
        except TandemError as problem:
            fail(trace, problem)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not trace.outcome:
                trace.cancel()
            raise
        except Exception as problem:  # the trace records each failure, and raises it again
            trace.fail(TandemError.reason, type(problem).__name__)
            raise
        finally:
            self.close(trace)

    def begin(self, trace: C) -> None:
        """Open a trace until `close`."""
        trace.begin_s = trace.begin_s or trace.clock()
        trace.span_context = self.child(trace.parent)
        self._open[id(trace)] = trace

    def close(self, trace: C) -> None:
        """Close a trace and call the sinks; a trace without an outcome is recorded as cancelled."""
        trace.end_s = trace.clock()
        if not trace.outcome:
            trace.cancel()
        del self._open[id(trace)]
        self._closed.append(trace)
        self._report(trace, self.sinks)

    def close_part(self, trace: C) -> None:
        """Call the sinks of parts, for the attempts of a request that is run in several parts."""
        self._report(trace, self.part_sinks)

    @staticmethod
    def _report(trace: C, sinks: Sequence[Callable[[C], None]]) -> None:
        for sink in sinks:
            try:
                sink(trace)
            except Exception:
                # A broad except is right here: a failing observer must not change the result of the request.
                log.exception(
                    "observer failed while recording a finished request; its metrics or log line may be missing"
                )


def fail(trace: RequestTrace | LegTrace, problem: TandemError) -> None:
    """Record the error that ends a request or leg; a wrong request counts as refused, not as failed."""
    trace.fail(problem.reason, message_of(problem), is_refusal=isinstance(problem, RequestError))


def message_of(problem: TandemError) -> str:
    """Error message for a trace. For an invalid request only the field name: the message may quote client data."""
    return problem.metadata.get("field", "") if isinstance(problem, RequestError) else problem.message


def trace_ids(sample_ratio: float) -> TraceIds:
    """Ids from the system's random source: unpredictable, and unique across processes."""
    return TraceIds(sample_ratio, random.SystemRandom())
