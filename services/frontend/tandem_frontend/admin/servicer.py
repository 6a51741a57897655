"""FrontendAdminService: timelines, request list and statistics of all processes of this frontend.

Read-only. Does not need admin_enabled: responses contain no prompts, and a caller that can reach this service can also
reach the inference service. Each process responds for the whole frontend by querying its siblings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1 import admin_service_pb2_grpc as pb_grpc
from tandem.api.frontend.v1 import sibling_service_pb2 as sibling_pb
from tandem.domain.limits import REQUEST_ID_CHARS_MAX
from tandem.errors import InvalidRequest, RequestNotFound
from tandem_frontend.admin.local_requests import LocalRequests, Position
from tandem_frontend.processes.siblings import Siblings
from tandem_frontend.processes.sums import combined

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FrontendAdminService"].full_name
INTERVAL_MS, INTERVAL_MS_MIN, INTERVAL_MS_MAX = 1_000, 100, 60_000
PAGE_SIZE, PAGE_SIZE_MAX = 100, 1_000
TIMELINES_MAX = 128


class FrontendAdminServicer(pb_grpc.FrontendAdminServiceServicer):
    """Implements FrontendAdminService of admin_service.proto."""

    def __init__(self, own: LocalRequests, siblings: Siblings) -> None:
        self._own = own
        self._siblings = siblings

    async def GetRequestTimeline(  # noqa: N802
        self, request: pb.GetRequestTimelineRequest, context: Any
    ) -> pb.GetRequestTimelineResponse:
        """Timelines of all requests with that request id or x-request-id."""
        wanted = request.request_id
        if not wanted or len(wanted) > REQUEST_ID_CHARS_MAX:
            raise InvalidRequest("request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters long")
        found = self._own.timelines(wanted)
        others = await self._siblings.ask(lambda sibling: sibling.timelines(wanted))
        if any(others):
            found = sorted((*found, *(timeline for other in others for timeline in other)), key=_begin)
        if not found:
            silent = self._siblings.silent
            unreachable = f"; process {', '.join(map(str, silent))} did not respond" if silent else ""
            raise RequestNotFound(
                f"request {wanted} not found on this frontend (only the last finished requests are kept){unreachable}",
                request_id=wanted,
            )
        return pb.GetRequestTimelineResponse(timelines=found[-TIMELINES_MAX:])

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Any) -> pb.ListRequestsResponse:  # noqa: N802
        """One page, newest first."""
        size = request.page_size if request.HasField("page_size") else PAGE_SIZE
        if not 1 <= size <= PAGE_SIZE_MAX:
            raise InvalidRequest("page_size", f"must be 1 to {PAGE_SIZE_MAX}, not {size}")
        before = _parse_token(request.page_token) if request.HasField("page_token") else None
        # One more than fits the page shows whether there is a next page.
        known = self._own.requests(size + 1, before, open_only=request.open_only)
        asked = sibling_pb.ListSiblingRequestsRequest(open_only=request.open_only, count=size + 1)
        if before is not None:
            asked.before.begin_s, asked.before.request_id = before
        for more in await self._siblings.ask(lambda sibling: sibling.requests(asked)):
            known += more
        known.sort(key=lambda listed: (listed.position.begin_s, listed.position.request_id), reverse=True)
        page = known[:size]
        return pb.ListRequestsResponse(
            requests=[listed.summary for listed in page],
            next_page_token=_token(page[-1].position) if len(known) > size else "",
        )

    async def WatchFigures(  # noqa: N802
        self, request: pb.WatchFiguresRequest, context: Any
    ) -> AsyncIterator[pb.WatchFiguresResponse]:
        """Statistics now and at each interval."""
        interval_ms = request.interval_ms if request.HasField("interval_ms") else INTERVAL_MS
        if not INTERVAL_MS_MIN <= interval_ms <= INTERVAL_MS_MAX:
            raise InvalidRequest("interval_ms", f"must be {INTERVAL_MS_MIN} to {INTERVAL_MS_MAX}")
        sequence = 0
        while True:
            sequence += 1
            others = await self._siblings.ask(lambda sibling: sibling.figures())
            stats = combined([self._own.figures(), *others])
            stats.sequence = sequence
            yield stats
            await asyncio.sleep(interval_ms / 1_000)


def _begin(timeline: pb.RequestTimeline) -> int:
    return timeline.begin.time.ToNanoseconds()


def _token(position: sibling_pb.RequestPosition) -> str:
    return f"{position.begin_s!r} {position.request_id}"


def _parse_token(token: str) -> Position:
    begin, _, request_id = token.partition(" ")
    try:
        return float(begin), request_id
    except ValueError:
        raise InvalidRequest("page_token", "is not a next_page_token of this service") from None
