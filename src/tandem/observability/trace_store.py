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
from tandem.observability.request_trace import Course, LegCourse
from tandem.observability.trace_context import TraceContext, TraceIds

log = logging.getLogger(__name__)

CLOSED_KEPT = 256

C = TypeVar("C", Course, LegCourse)


class Courses(Generic[C]):
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
    def following(self, course: C) -> Iterator[C]:
        """Have a course open; whatever leaves this is its ending."""
        self.begin(course)
        about.set(course)
        try:
            yield course
        except TandemError as problem:
            course.fail(problem.reason, message_of(problem))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not course.outcome:
                course.cancel()
            raise
        except Exception as problem:
            course.fail(TandemError.reason, type(problem).__name__)
            raise
        finally:
            self.close(course)

    def begin(self, course: C) -> None:
        """Have a course open until `close`."""
        course.begin_s = course.begin_s or course.clock()
        course.trace = self.child(course.parent)
        self._open[id(course)] = course

    def close(self, course: C) -> None:
        """The end of a course whose outcome is set; without one it was cancelled."""
        course.end_s = course.clock()
        if not course.outcome:
            course.cancel()
        del self._open[id(course)]
        self._closed.append(course)
        for sink in self.sinks:
            try:
                sink(course)
            except Exception:
                # The one place besides the interceptor: what is told of a request must not change its ending.
                log.exception("a request could not be told of")


def message_of(problem: TandemError) -> str:
    """What a record may hold of a failure. Of a refused value only the name of its field: the value is the client's."""
    return problem.metadata.get("field", "") if isinstance(problem, RequestError) else problem.message


def trace_ids(sample_ratio: float) -> TraceIds:
    """Ids that nobody can guess or meet twice."""
    return TraceIds(sample_ratio, random.SystemRandom())
