"""PrefillService on the wire: protobuf to the hop and back, nothing else.

Errors become statuses in tandem.rpc.interceptors.
"""

from __future__ import annotations

from typing import Any

from tandem.api.prefill.v2 import prefill_service_pb2 as pb
from tandem.api.prefill.v2 import prefill_service_pb2_grpc as pb_grpc
from tandem.worker.leg_starts import LegStarts

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """The contract of prefill_service.proto."""

    def __init__(self, starts: LegStarts) -> None:
        self._starts = starts

    async def StartLegs(self, request: pb.StartLegsRequest, context: Any) -> pb.StartLegsResponse:  # noqa: N802
        """Start legs; what they generate goes out on the caller's step stream."""
        return pb.StartLegsResponse(results=await self._starts.start(request.stream_id, request.legs))
