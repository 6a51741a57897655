"""The prefill role: converts prefill legs to engine requests, and serves StartLegs.

A prefill leg always has a decode peer, which connects to this worker's own bootstrap server; a bootstrap address in the
request is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tandem.api.prefill.v1.prefill_service_pb2 import DESCRIPTOR as V1
from tandem.api.prefill.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server as add_v1
from tandem.api.prefill.v2 import prefill_service_pb2 as pb
from tandem.api.prefill.v2 import prefill_service_pb2_grpc as pb_grpc
from tandem.api.types.v1 import leg_pb2
from tandem.domain.generation import Bootstrap, EngineRequest
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import InvalidRequest
from tandem.rpc.server import AddServicer
from tandem.worker.leg_messages import engine_request, wrong_role
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.step_servicer import FormerPrefillServicer
from tandem.worker.steps import StepStreams

SERVICE_NAMES = tuple(file.services_by_name["PrefillService"].full_name for file in (pb.DESCRIPTOR, V1))


class PrefillLegs:
    """Converts prefill legs to engine requests."""

    def __init__(self, current: Callable[[], Worker]) -> None:
        """`current` is the worker with its present role and bootstrap server."""
        self._current = current

    def __call__(self, leg: leg_pb2.LegRequest) -> EngineRequest:
        """The engine's request for a leg.

        Raises:
            WrongRole: the worker is no prefill worker.
            InvalidRequest: the leg has no bootstrap room.
        """
        worker = self._current()
        if worker.role is not WorkerRole.PREFILL:
            role = worker.role.value
            raise wrong_role(worker, f"worker {worker.worker_id} has role {role}: it rejects prefill legs")
        assert worker.bootstrap_host is not None, "a prefill engine has a bootstrap server"
        assert worker.bootstrap_port is not None, "a prefill engine has a bootstrap server"
        if not leg.HasField("bootstrap") or leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "is required on a prefill leg and must be positive")
        room = leg.bootstrap.room
        return engine_request(leg, Bootstrap(host=worker.bootstrap_host, port=worker.bootstrap_port, room=room))


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """The contract of prefill_service.proto. Errors become statuses in `tandem.rpc.handler_guard`."""

    def __init__(self, starts: LegStarts) -> None:
        self._starts = starts

    async def StartLegs(self, request: pb.StartLegsRequest, context: Any) -> pb.StartLegsResponse:  # noqa: N802
        """Start legs; their tokens are sent on the caller's step stream."""
        return pb.StartLegsResponse(results=await self._starts.start(request.stream_id, request.legs))


def services(legs: Legs, streams: StepStreams, current: Callable[[], Worker]) -> list[tuple[str, AddServicer]]:
    """The role's services by name: the current leg contract, and version 1, whose calls are rejected."""
    servicer = PrefillServicer(LegStarts(legs, streams, PrefillLegs(current)))
    name, v1_name = SERVICE_NAMES
    return [
        (name, partial(pb_grpc.add_PrefillServiceServicer_to_server, servicer)),
        (v1_name, partial(add_v1, FormerPrefillServicer(legs))),
    ]
