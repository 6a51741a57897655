"""The courses of a process: those that are open, the last ones that have closed, and who is told when one closes.

Owns how an ending is read from what is raised. A sink that fails is logged and never reaches the request.
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
    """Opens and closes courses."""

    def __init__(
        self,
        sinks: Sequence[Callable[[C], None]] = (),
        *,
        closed_kept: int = CLOSED_KEPT,
        ids: TraceIds | None = None,
    ) -> None:
        """Each sink is called once with each course that closes; `ids` is None where no spans are exported."""
        self.sinks: list[Callable[[C], None]] = list(sinks)
        self.ids = ids
        self._open: dict[int, C] = {}
        self._closed: deque[C] = deque(maxlen=closed_kept)

    @property
    def open(self) -> list[C]:
        """Those that run now, the oldest first."""
        return list(self._open.values())

    @property
    def closed(self) -> list[C]:
        """The last ones, the newest last."""
        return list(self._closed)

    def child(self, parent: TraceContext | None) -> TraceContext | None:
        """The span below `parent`; where nothing is exported `parent` itself, which is then passed on."""
        return parent if self.ids is None else self.ids.child(parent)

    @contextlib.contextmanager
    def following(self, trace: C) -> Iterator[C]:
        """Have a course open; whatever leaves this is its ending."""
        self.begin(trace)
        about.set(trace)
        try:
            yield trace
        except TandemError as problem:
            trace.fail(problem.reason, message_of(problem))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not trace.outcome:
                trace.cancel()
            raise
        except Exception as problem:
            trace.fail(TandemError.reason, type(problem).__name__)
            raise
        finally:
            self.close(trace)

    def begin(self, trace: C) -> None:
        """Have a course open until `close`."""
        trace.begin_s = trace.begin_s or trace.clock()
        trace.span_context = self.child(trace.parent)
        self._open[id(trace)] = trace

    def close(self, trace: C) -> None:
        """The end of a course whose outcome is set; without one it was cancelled."""
        trace.end_s = trace.clock()
        if not trace.outcome:
            trace.cancel()
        del self._open[id(trace)]
        self._closed.append(trace)
        for sink in self.sinks:
            try:
                sink(trace)
            except Exception:
                # The one place besides the interceptor: what is told of a request must not change its ending.
                log.exception("a request could not be told of")


def message_of(problem: TandemError) -> str:
    """What a record may hold of a failure. Of a refused value only the name of its field: the value is the client's."""
    return problem.metadata.get("field", "") if isinstance(problem, RequestError) else problem.message


def trace_ids(sample_ratio: float) -> TraceIds:
    """Ids that nobody can guess or meet twice."""
    return TraceIds(sample_ratio, random.SystemRandom())
