"""The prefill hop: what a prefill leg is to the engine.

A prefill leg always has a peer, and meets it here: the bootstrap server is this worker's own, whatever the caller
wrote. Streams nothing to clients.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from tandem.api.types.v1 import leg_pb2
from tandem.errors import InvalidRequest
from tandem.model.generation import Bootstrap, TokenBatch
from tandem.model.worker import Worker
from tandem.observe.trace_context import TraceContext
from tandem.worker.leg_messages import engine_request, leg_key
from tandem.worker.legs import Legs


class Prefill:
    """Runs prefill legs."""

    def __init__(self, legs: Legs, worker: Worker) -> None:
        assert worker.bootstrap_host is not None, "a prefill engine has a bootstrap server"
        assert worker.bootstrap_port is not None, "a prefill engine has a bootstrap server"
        self._legs = legs
        self._host, self._port = worker.bootstrap_host, worker.bootstrap_port

    def admit(self, leg: leg_pb2.LegRequest, parent: TraceContext | None) -> AsyncGenerator[TokenBatch, None]:
        """Check a leg and return its batches, which begin to run when they are read. `parent` is the caller's span.

        Raises:
            StaleEpoch, ModelNotFound, Draining, InvalidRequest
        """
        self._legs.admit(leg.worker_epoch, leg.model)
        if not leg.HasField("bootstrap") or leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "must be a positive number: a prefill leg has a peer")
        bootstrap = Bootstrap(host=self._host, port=self._port, room=leg.bootstrap.room)
        return self._legs.run(leg_key(leg), engine_request(leg, bootstrap), parent)

    def leaving(self, leg: leg_pb2.LegRequest) -> None:
        """Whoever asked for a leg has left; its batches are about to be closed."""
        self._legs.leaving(leg_key(leg))
