"""StartLegs for both roles: checks each leg of the call, submits it to the engine, and reports accepted or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tandem.api.types.v1 import leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.domain.generation import EngineRequest
from tandem.errors import InvalidRequest, TandemError
from tandem.observability.trace_context import TRACEPARENT, TRACESTATE, parsed
from tandem.rpc.status import to_status
from tandem.worker.leg_messages import check_task, expected_cached_tokens, leg_adapter, leg_key
from tandem.worker.legs import Legs, defect_of
from tandem.worker.steps import StepStream, StepStreams

log = logging.getLogger(__name__)

Role = Callable[[leg_pb2.LegRequest], EngineRequest]
"""Converts a leg to an engine request for the worker's role; raises WrongRole or InvalidRequest."""
LEGS_MAX = 4_096
"""Maximum number of legs in one StartLegs call."""


class LegStarts:
    """Starts the legs of one worker."""

    def __init__(self, legs: Legs, streams: StepStreams, role: Role) -> None:
        self._legs = legs
        self._streams = streams
        self._role = role

    async def start(self, stream_id: int, starts: Sequence[leg2_pb2.LegStart]) -> list[leg2_pb2.LegStartResult]:
        """Start legs on a stream; returns one result per leg, in order. A refused leg does not affect the others.

        Raises:
            InvalidRequest: the number of legs is not 1 to LEGS_MAX.
            ServiceError: the stream is not open.
        """
        if not 1 <= len(starts) <= LEGS_MAX:
            raise InvalidRequest("legs", f"must be 1 to {LEGS_MAX} legs, not {len(starts)}")
        stream = self._streams.get(stream_id)
        return [await self._start(stream, start) for start in starts]

    async def _start(self, stream: StepStream, start: leg2_pb2.LegStart) -> leg2_pb2.LegStartResult:
        request = start.request
        try:
            check_task(request, self._legs.admit(request.worker_epoch, request.model, leg_adapter(request)))
            await self._legs.start(
                leg_key(request),
                self._role(request),
                stream,
                start.leg,
                parent=parsed({TRACEPARENT: start.traceparent, TRACESTATE: start.tracestate}),
                timeout_s=start.timeout.ToNanoseconds() / 1e9 if start.HasField("timeout") else None,
                expected_cached_tokens=expected_cached_tokens(request),
            )
        except TandemError as problem:
            return leg2_pb2.LegStartResult(refused=to_status(problem))
        except Exception as problem:
            # Of this leg: those before it in the call have started, and the frontend must hear that they have.
            log.exception("leg %d of %s could not be started", start.leg, request.request_id)
            return leg2_pb2.LegStartResult(refused=to_status(defect_of(problem)))
        accepted = leg_pb2.LegAccepted(worker_id=self._legs.worker_id, epoch=request.worker_epoch)
        return leg2_pb2.LegStartResult(accepted=accepted)
