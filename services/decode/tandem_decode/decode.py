"""The decode hop: what a decode leg is to the engine.

On a decode worker a leg comes with the address of the prefill engine that holds its KV; on an aggregated worker it
comes without. Chooses no other worker.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from tandem.api.types.v1 import leg_pb2
from tandem.errors import InvalidRequest, WrongRole
from tandem.model.generation import TokenBatch
from tandem.model.worker import Worker, WorkerRole
from tandem.observe.trace_context import TraceContext
from tandem.rpc.messages import bootstrap_from_proto
from tandem.worker.leg_messages import engine_request, leg_key
from tandem.worker.legs import Legs

PORT_MAX = 65_535


class Decode:
    """Runs decode legs."""

    def __init__(self, legs: Legs, worker: Worker) -> None:
        self._legs = legs
        self._worker = worker

    def admit(self, leg: leg_pb2.LegRequest, parent: TraceContext | None) -> AsyncGenerator[TokenBatch, None]:
        """Check a leg and return its batches, which begin to run when they are read. `parent` is the caller's span.

        Raises:
            StaleEpoch, ModelNotFound, Draining, WrongRole, InvalidRequest
        """
        self._legs.admit(leg.worker_epoch, leg.model)
        has_peer = leg.HasField("bootstrap")
        if has_peer is (self._worker.role is WorkerRole.AGGREGATED):
            refused = "with" if has_peer else "without"
            raise WrongRole(
                f"worker {self._worker.worker_id} is {self._worker.role.value} and runs no leg {refused} a peer",
                worker=self._worker.worker_id,
                role=self._worker.role.value,
            )
        if not has_peer:
            return self._legs.run(leg_key(leg), engine_request(leg, None), parent)
        if not leg.bootstrap.host:
            raise InvalidRequest("leg.bootstrap.host", "must be given")
        if not 0 < leg.bootstrap.port <= PORT_MAX:
            raise InvalidRequest("leg.bootstrap.port", f"must be 1 to {PORT_MAX}")
        if leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "must be a positive number")
        return self._legs.run(leg_key(leg), engine_request(leg, bootstrap_from_proto(leg.bootstrap)), parent)

    def leaving(self, leg: leg_pb2.LegRequest) -> None:
        """Whoever asked for a leg has left; its batches are about to be closed."""
        self._legs.leaving(leg_key(leg))
