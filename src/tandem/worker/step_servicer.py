"""StepService, and the servicers that reject calls of leg contract 1.

Owns the lifetime of a step stream's call. `steps` owns the messages on it, `legs` aborts its legs when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import tandem
from tandem.api.decode.v1 import decode_service_pb2_grpc
from tandem.api.prefill.v1 import prefill_service_pb2_grpc
from tandem.api.worker.v2 import step_service_pb2 as pb
from tandem.api.worker.v2 import step_service_pb2_grpc as pb_grpc
from tandem.domain.worker import LEG_CONTRACT, WORKER_ID_CHARS_MAX
from tandem.errors import InvalidRequest, NotSupported
from tandem.worker.legs import Legs
from tandem.worker.steps import StepStreams

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["StepService"].full_name


class StepServicer(pb_grpc.StepServiceServicer):
    """Implements step_service.proto."""

    def __init__(self, legs: Legs, streams: StepStreams) -> None:
        self._legs = legs
        self._streams = streams

    async def StreamSteps(self, request: pb.StreamStepsRequest, context: Any) -> AsyncIterator[pb.StreamStepsResponse]:  # noqa: N802
        """Stream tokens and ends of one frontend's legs. When the stream ends, on either side, its legs are aborted."""
        if request.leg_contract != LEG_CONTRACT:
            raise other_contract(self._legs.worker_id, request.leg_contract)
        if len(request.frontend_id) > WORKER_ID_CHARS_MAX:
            raise InvalidRequest("frontend_id", f"must be at most {WORKER_ID_CHARS_MAX} characters long")
        self._legs.check_epoch(request.worker_epoch)
        self._legs.check_admission()
        call = asyncio.current_task()
        assert call is not None, "a handler runs in a task"
        # On overflow the call is blocked in HTTP/2 flow control, perhaps forever: only a cancellation ends it.
        stream = self._streams.open(request.frontend_id, on_overflow=call.cancel)
        try:
            async with contextlib.aclosing(stream.messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            self._streams.close(stream)

    async def AbortLegs(self, request: pb.AbortLegsRequest, context: Any) -> pb.AbortLegsResponse:  # noqa: N802
        """Abort legs by number."""
        stream = self._streams.get(request.stream_id)
        return pb.AbortLegsResponse(aborted_legs=self._legs.abort_numbered(stream.stream_id, request.legs))


class FormerPrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Rejects calls of leg contract 1."""

    def __init__(self, legs: Legs) -> None:
        self._legs = legs

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Reject with NotSupported."""
        raise other_contract(self._legs.worker_id, 1)
        yield  # makes this an async generator: the call is a server stream


class FormerDecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """Rejects calls of leg contract 1."""

    def __init__(self, legs: Legs) -> None:
        self._legs = legs

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Reject with NotSupported."""
        raise other_contract(self._legs.worker_id, 1)
        yield  # makes this an async generator: the call is a server stream


def other_contract(worker_id: str, version: int) -> NotSupported:
    """The error for a caller with another version of the leg contract."""
    return NotSupported(
        f"leg contract mismatch: worker {worker_id} (release {tandem.__version__}) speaks leg contract {LEG_CONTRACT}, "
        f"the caller speaks leg contract {version}; upgrade the older of the two",
        worker=worker_id,
    )
