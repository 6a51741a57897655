"""DecodeService on the wire: protobuf to the hop and back, nothing else.

Errors become statuses in tandem.rpc.interceptors.
"""

from __future__ import annotations

from typing import Any

from tandem.api.decode.v2 import decode_service_pb2 as pb
from tandem.api.decode.v2 import decode_service_pb2_grpc as pb_grpc
from tandem.worker.leg_starts import LegStarts

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DecodeService"].full_name


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """The contract of decode_service.proto."""

    def __init__(self, starts: LegStarts) -> None:
        self._starts = starts

    async def StartLegs(self, request: pb.StartLegsRequest, context: Any) -> pb.StartLegsResponse:  # noqa: N802
        """Start legs; what they generate goes out on the caller's step stream."""
        return pb.StartLegsResponse(results=await self._starts.start(request.stream_id, request.legs))
