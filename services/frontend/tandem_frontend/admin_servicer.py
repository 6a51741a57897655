"""FrontendAdminService on the wire: courses and figures as messages, with bounds on pages and intervals.

Reads only. Nothing here needs admin_enabled: no prompt of a course is told, and whoever can call this could as well
call the service that the requests come to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1 import admin_service_pb2_grpc as pb_grpc
from tandem.errors import InvalidRequest, RequestNotFound
from tandem.observe.course import CANCELLED, FAILED, FINISHED, REFUSED, Course
from tandem.observe.courses import Courses
from tandem.observe.sliding import LATENCY_WINDOW_S
from tandem.rpc.messages import timestamp
from tandem_frontend.figures import Figures
from tandem_frontend.timeline import duration, latency_figures, reason_number, summary_of, timeline_of

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FrontendAdminService"].full_name
INTERVAL_MS, INTERVAL_MS_MIN, INTERVAL_MS_MAX = 1_000, 100, 60_000
PAGE_SIZE, PAGE_SIZE_MAX = 100, 1_000
TIMELINES_MAX = 128
ID_CHARS_MAX = 128


class FrontendAdminServicer(pb_grpc.FrontendAdminServiceServicer):
    """The contract of admin_service.proto."""

    def __init__(self, courses: Courses[Course], figures: Figures, waiting_count: Callable[[], int]) -> None:
        """`waiting_count` says how many requests wait for room with the workers."""
        self._courses = courses
        self._figures = figures
        self._waiting_count = waiting_count

    async def GetRequestTimeline(  # noqa: N802
        self, request: pb.GetRequestTimelineRequest, context: Any
    ) -> pb.GetRequestTimelineResponse:
        """The courses that an id stands for."""
        wanted = request.request_id
        if not wanted or len(wanted) > ID_CHARS_MAX:
            raise InvalidRequest("request_id", f"must have 1 to {ID_CHARS_MAX} characters")
        found = [course for course in self._known() if wanted in (course.request_id, course.call_id)]
        if not found:
            raise RequestNotFound(
                f"this frontend knows no request {wanted}, or no longer: only the last ones that ended are kept",
                request_id=wanted,
            )
        return pb.GetRequestTimelineResponse(timelines=[timeline_of(course) for course in found[-TIMELINES_MAX:]])

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Any) -> pb.ListRequestsResponse:  # noqa: N802
        """One page, newest first."""
        size = request.page_size if request.HasField("page_size") else PAGE_SIZE
        if not 1 <= size <= PAGE_SIZE_MAX:
            raise InvalidRequest("page_size", f"must be 1 to {PAGE_SIZE_MAX}, not {size}")
        known = self._courses.open if request.open_only else self._known()
        known.sort(key=_place, reverse=True)
        if request.HasField("page_token"):
            before = _parse_token(request.page_token)
            known = [course for course in known if _place(course) < before]
        page, now_s = known[:size], time.time()
        return pb.ListRequestsResponse(
            requests=[summary_of(course, now_s) for course in page],
            next_page_token=_token(page[-1]) if len(known) > size else "",
        )

    async def WatchFigures(  # noqa: N802
        self, request: pb.WatchFiguresRequest, context: Any
    ) -> AsyncIterator[pb.WatchFiguresResponse]:
        """The figures now, and then at each interval."""
        interval_ms = request.interval_ms if request.HasField("interval_ms") else INTERVAL_MS
        if not INTERVAL_MS_MIN <= interval_ms <= INTERVAL_MS_MAX:
            raise InvalidRequest("interval_ms", f"must be {INTERVAL_MS_MIN} to {INTERVAL_MS_MAX}")
        sequence = 0
        while True:
            sequence += 1
            yield self._measure(sequence)
            await asyncio.sleep(interval_ms / 1_000)

    def _known(self) -> list[Course]:
        return [*self._courses.closed, *self._courses.open]

    def _measure(self, sequence: int) -> pb.WatchFiguresResponse:
        figures = self._figures
        figures.look()
        return pb.WatchFiguresResponse(
            sequence=sequence,
            measured_time=timestamp(time.time()),
            counted_since=timestamp(figures.since_s),
            open_requests=figures.open_count,
            waiting_requests=self._waiting_count(),
            finished_requests=figures.outcomes[FINISHED],
            failed_requests=figures.outcomes[FAILED],
            refused_requests=figures.outcomes[REFUSED],
            cancelled_requests=figures.outcomes[CANCELLED],
            continuations=figures.continuations,
            leg_failures=[
                pb.LegFailures(worker_id=worker_id, reason=reason_number(reason), count=count)
                for (worker_id, reason), count in figures.leg_failures.items()
            ],
            window=duration(LATENCY_WINDOW_S),
            time_to_first_token=latency_figures(figures.ttft.latencies()),
            inter_token_latency=latency_figures(figures.itl.latencies()),
            completion_tokens=figures.tokens.total,
            completion_tokens_per_s=figures.tokens.per_s(),
            kv_transfer_bytes=figures.kv_transfer_bytes.total,
            kv_transfer_bytes_per_s=figures.kv_transfer_bytes.per_s(),
        )


def _place(course: Course) -> tuple[float, str]:
    return course.begin_s, course.request_id


def _token(course: Course) -> str:
    return f"{course.begin_s!r} {course.request_id}"


def _parse_token(token: str) -> tuple[float, str]:
    begin, _, request_id = token.partition(" ")
    try:
        return float(begin), request_id
    except ValueError:
        raise InvalidRequest("page_token", "is not one that was given out") from None
