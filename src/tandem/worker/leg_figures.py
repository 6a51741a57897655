"""What a worker's legs have done since its start, for `tandem top`: tokens, bytes of KV, failures.

Owns the sums, which come from courses alone.
"""

from __future__ import annotations

from tandem.observability.request_trace import FAILED, LegCourse
from tandem.observability.trace_store import Courses


class LegFigures:
    """Counts that only grow."""

    def __init__(self, courses: Courses[LegCourse]) -> None:
        """Is told of every leg from here on."""
        self._courses = courses
        self._completion_tokens = 0
        self._prompt_tokens = 0
        self._kv_transfer_bytes = 0
        self._failed_legs = 0
        courses.sinks.append(self.close)

    def close(self, course: LegCourse) -> None:
        """A leg has ended."""
        self._completion_tokens += course.token_count
        self._failed_legs += course.outcome == FAILED
        finish = course.engine_finish
        if finish is not None:
            self._prompt_tokens += course.prompt_tokens
            if finish.timings is not None:
                self._kv_transfer_bytes += finish.timings.kv_transfer_bytes or 0

    def counts(self) -> dict[str, int]:
        """As keyword arguments of WatchLoadResponse; tokens of open legs are among them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens + sum(course.token_count for course in self._courses.open),
            "kv_transfer_bytes": self._kv_transfer_bytes,
            "failed_legs": self._failed_legs,
        }
