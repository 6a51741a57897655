"""SiblingService on the wire: this process's requests and stats, for the other processes of its frontend."""

from __future__ import annotations

from typing import Any

from tandem.api.frontend.v1 import sibling_service_pb2 as pb
from tandem.api.frontend.v1 import sibling_service_pb2_grpc as pb_grpc
from tandem.rpc.process_servicer import ProcessServicer
from tandem_frontend.admin.local_requests import LocalRequests

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SiblingService"].full_name


class SiblingServicer(pb_grpc.SiblingServiceServicer):
    """The contract of sibling_service.proto."""

    def __init__(self, own: LocalRequests, process: ProcessServicer) -> None:
        """`process`: of the server that clients call, not of the one for siblings."""
        self._own = own
        self._process = process

    async def GetSiblingTimelines(  # noqa: N802
        self, request: pb.GetSiblingTimelinesRequest, context: Any
    ) -> pb.GetSiblingTimelinesResponse:
        """The timelines of all requests that an id matches."""
        return pb.GetSiblingTimelinesResponse(timelines=self._own.timelines(request.request_id))

    async def ListSiblingRequests(  # noqa: N802
        self, request: pb.ListSiblingRequestsRequest, context: Any
    ) -> pb.ListSiblingRequestsResponse:
        """Requests, newest first."""
        before = (request.before.begin_s, request.before.request_id) if request.HasField("before") else None
        found = self._own.requests(request.count, before, open_only=request.open_only)
        return pb.ListSiblingRequestsResponse(requests=found)

    async def GetSiblingFigures(  # noqa: N802
        self, request: pb.GetSiblingFiguresRequest, context: Any
    ) -> pb.GetSiblingFiguresResponse:
        """The current stats."""
        return self._own.figures()

    async def GetSiblingProcess(  # noqa: N802
        self, request: pb.GetSiblingProcessRequest, context: Any
    ) -> pb.GetSiblingProcessResponse:
        """The resources held now."""
        return pb.GetSiblingProcessResponse(process=self._process.own())
