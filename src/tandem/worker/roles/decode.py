"""The decode hop: what a decode leg is to the engine.

On a decode worker a leg comes with the address of the prefill engine that holds its KV; on an aggregated worker it
comes without. Chooses no other worker.
"""

from __future__ import annotations

from tandem.api.types.v1 import leg_pb2
from tandem.domain.generation import EngineRequest
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import InvalidRequest, WrongRole
from tandem.rpc.convert import bootstrap_from_proto
from tandem.worker.leg_messages import engine_request

PORT_MAX = 65_535


class Decode:
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
