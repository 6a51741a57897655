"""The prefill hop: what a prefill leg is to the engine.

A prefill leg always has a peer, and meets it here: the bootstrap server is this worker's own, whatever the caller
wrote. Streams nothing to clients.
"""

from __future__ import annotations

from tandem.api.types.v1 import leg_pb2
from tandem.domain.generation import Bootstrap, EngineRequest
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest
from tandem.worker.leg_messages import engine_request


class Prefill:
    """Turns prefill legs into requests of an engine."""

    def __init__(self, worker: Worker) -> None:
        assert worker.bootstrap_host is not None, "a prefill engine has a bootstrap server"
        assert worker.bootstrap_port is not None, "a prefill engine has a bootstrap server"
        self._host, self._port = worker.bootstrap_host, worker.bootstrap_port

    def __call__(self, leg: leg_pb2.LegRequest) -> EngineRequest:
        """What the engine is asked for.

        Raises:
            InvalidRequest
        """
        if not leg.HasField("bootstrap") or leg.bootstrap.room < 1:
            raise InvalidRequest("leg.bootstrap.room", "must be a positive number: a prefill leg has a peer")
        return engine_request(leg, Bootstrap(host=self._host, port=self._port, room=leg.bootstrap.room))
