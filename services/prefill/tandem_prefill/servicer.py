"""PrefillService on the wire: protobuf to the hop and back, nothing else.

Errors become statuses in tandem.rpc.interceptors.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from tandem.api.prefill.v1 import prefill_service_pb2 as pb
from tandem.api.prefill.v1 import prefill_service_pb2_grpc as pb_grpc
from tandem.model.worker import Worker
from tandem.observe.trace_context import caller_span
from tandem.worker.leg_messages import accepted, leg_events
from tandem_prefill.prefill import Prefill

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """The contract of prefill_service.proto."""

    def __init__(self, prefill: Prefill, worker: Worker) -> None:
        self._prefill = prefill
        self._worker = worker

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> AsyncIterator[pb.PrefillResponse]:  # noqa: N802
        """Run a leg; a caller that leaves closes the batches, which aborts it in the engine."""
        async with contextlib.aclosing(self._prefill.admit(request.leg, caller_span(context))) as batches:
            left = partial(self._prefill.leaving, request.leg)
            yield pb.PrefillResponse(accepted=accepted(self._worker, request.leg))
            async with contextlib.aclosing(leg_events(batches, self._worker.role, left)) as events:
                async for event in events:
                    yield pb.PrefillResponse(**event)
