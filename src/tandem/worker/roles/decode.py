"""The decode role: what a decode leg asks of the engine, and the service that starts such legs.

On a decode worker a leg comes with the address of the prefill engine that holds its KV; on an aggregated worker it
comes without. Chooses no other worker.
"""

from __future__ import annotations

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
from tandem.errors import InvalidRequest, WrongRole
from tandem.rpc.convert import bootstrap_from_proto
from tandem.rpc.server import AddServicer
from tandem.worker.leg_messages import engine_request
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.step_servicer import FormerDecodeServicer
from tandem.worker.steps import StepStreams


class DecodeLegs:
    """Turns decode legs into requests of an engine."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __call__(self, leg: leg_pb2.LegRequest) -> EngineRequest:
        """What the engine is asked for.

        Raises:
            WrongRole, InvalidRequest
        """
        has_peer = leg.HasField("bootstrap")
        if has_peer is (self._worker.role is WorkerRole.AGGREGATED):
            refused = "with" if has_peer else "without"
            raise WrongRole(
                f"worker {self._worker.worker_id} is {self._worker.role.value} and runs no leg {refused} a peer",
                worker=self._worker.worker_id,
                role=self._worker.role.value,
            )
        if not has_peer:
            return engine_request(leg, None)
        if not leg.bootstrap.host:
            raise InvalidRequest("leg.bootstrap.host", "must be given")
        if not 0 < leg.bootstrap.port <= PORT_MAX:
            raise InvalidRequest("leg.bootstrap.port", f"must be 1 to {PORT_MAX}")
        if leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "must be a positive number")
        return engine_request(leg, bootstrap_from_proto(leg.bootstrap))


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """The contract of decode_service.proto. Errors become statuses in `tandem.rpc.interceptors`."""

    def __init__(self, starts: LegStarts) -> None:
        self._starts = starts

    async def StartLegs(self, request: pb.StartLegsRequest, context: Any) -> pb.StartLegsResponse:  # noqa: N802
        """Start legs; what they generate goes out on the caller's step stream."""
        return pb.StartLegsResponse(results=await self._starts.start(request.stream_id, request.legs))


def services(legs: Legs, streams: StepStreams, worker: Worker) -> list[tuple[str, AddServicer]]:
    """The role's services by name: the present leg contract, and the one before, which is refused by its version."""
    servicer = DecodeServicer(LegStarts(legs, streams, DecodeLegs(worker)))
    name, v1_name = (file.services_by_name["DecodeService"].full_name for file in (pb.DESCRIPTOR, V1))
    return [
        (name, partial(pb_grpc.add_DecodeServiceServicer_to_server, servicer)),
        (v1_name, partial(add_v1, FormerDecodeServicer(legs))),
    ]
