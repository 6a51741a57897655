"""DecodeService on the wire: protobuf to the hop and back, nothing else.

Errors become statuses in tandem.rpc.interceptors.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from tandem.api.decode.v1 import decode_service_pb2 as pb
from tandem.api.decode.v1 import decode_service_pb2_grpc as pb_grpc
from tandem.model.worker import Worker
from tandem.observe.trace_context import caller_span
from tandem.worker.leg_messages import accepted, leg_events
from tandem_decode.decode import Decode

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DecodeService"].full_name


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """The contract of decode_service.proto."""

    def __init__(self, decode: Decode, worker: Worker) -> None:
        self._decode = decode
        self._worker = worker

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> AsyncIterator[pb.DecodeResponse]:  # noqa: N802
        """Run a leg; a caller that leaves closes the batches, which aborts it in the engine."""
        async with contextlib.aclosing(self._decode.admit(request.leg, caller_span(context))) as batches:
            left = partial(self._decode.leaving, request.leg)
            yield pb.DecodeResponse(accepted=accepted(self._worker, request.leg))
            async with contextlib.aclosing(leg_events(batches, self._worker.role, left)) as events:
                async for event in events:
                    yield pb.DecodeResponse(**event)
