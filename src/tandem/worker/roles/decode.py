"""The decode role: converts decode legs to engine requests, and serves StartLegs.

On a decode worker a leg carries the bootstrap address of the prefill engine that holds its KV; on an aggregated worker
it carries none. Never selects a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tandem.api.decode.v1.decode_service_pb2 import DESCRIPTOR as V1
from tandem.api.decode.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server as add_v1
from tandem.api.decode.v2 import decode_service_pb2 as pb
from tandem.api.decode.v2 import decode_service_pb2_grpc as pb_grpc
from tandem.api.types.v1 import leg_pb2
from tandem.domain.generation import EngineRequest
from tandem.domain.limits import PORT_MAX
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import InvalidRequest
from tandem.rpc.convert import bootstrap_from_proto
from tandem.rpc.server import AddServicer
from tandem.worker.leg_messages import engine_request, wrong_role
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.step_servicer import FormerDecodeServicer
from tandem.worker.steps import StepStreams

SERVICE_NAMES = tuple(file.services_by_name["DecodeService"].full_name for file in (pb.DESCRIPTOR, V1))


class DecodeLegs:
    """Converts decode legs to engine requests."""

    def __init__(self, current: Callable[[], Worker]) -> None:
        """`current` is the worker with its present role."""
        self._current = current

    def __call__(self, leg: leg_pb2.LegRequest) -> EngineRequest:
        """The engine's request for a leg.

        Raises:
            WrongRole: a decode worker got a leg without bootstrap, or an aggregated worker one with it; or the worker
                is a prefill worker.
            InvalidRequest: a bootstrap field is missing or out of range.
        """
        worker, has_peer = self._current(), leg.HasField("bootstrap")
        role = worker.role.value
        if worker.role is WorkerRole.PREFILL:
            raise wrong_role(worker, f"worker {worker.worker_id} has role {role}: it rejects decode legs")
        if has_peer is (worker.role is WorkerRole.AGGREGATED):
            refused = "with" if has_peer else "without"
            raise wrong_role(
                worker, f"worker {worker.worker_id} has role {role}: it rejects legs {refused} a bootstrap address"
            )
        if not has_peer:
            return engine_request(leg, None)
        if not leg.bootstrap.host:
            raise InvalidRequest("leg.bootstrap.host", "is required")
        if not 0 < leg.bootstrap.port <= PORT_MAX:
            raise InvalidRequest("leg.bootstrap.port", f"must be 1 to {PORT_MAX}")
        if leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "must be a positive number")
        return engine_request(leg, bootstrap_from_proto(leg.bootstrap))


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """The contract of decode_service.proto. Errors become statuses in `tandem.rpc.handler_guard`."""

    def __init__(self, starts: LegStarts) -> None:
        self._starts = starts

    async def StartLegs(self, request: pb.StartLegsRequest, context: Any) -> pb.StartLegsResponse:  # noqa: N802
        """Start legs; their tokens are sent on the caller's step stream."""
        return pb.StartLegsResponse(results=await self._starts.start(request.stream_id, request.legs))


def services(legs: Legs, streams: StepStreams, current: Callable[[], Worker]) -> list[tuple[str, AddServicer]]:
    """The role's services by name: the current leg contract, and version 1, whose calls are rejected."""
    servicer = DecodeServicer(LegStarts(legs, streams, DecodeLegs(current)))
    name, v1_name = SERVICE_NAMES
    return [
        (name, partial(pb_grpc.add_DecodeServiceServicer_to_server, servicer)),
        (v1_name, partial(add_v1, FormerDecodeServicer(legs))),
    ]
