"""The dispatch hop: one attempt becomes one or two leg requests, sent at the same time.

Mints the room in which the legs meet. What comes back is the supervisor's business.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tandem.api.types.v1 import leg_pb2
from tandem.model.worker import Worker
from tandem.observe.trace_context import Headers
from tandem.rpc.channels import Channels
from tandem.rpc.leg_calls import LegCall, open_decode, open_prefill
from tandem_frontend.routing.candidates import Route

ROOM_BITS = 63


@dataclass(frozen=True, slots=True)
class Dispatched:
    """An attempt whose legs are on their way."""

    route: Route
    attempt: int
    room: int
    """0 on an aggregated route."""
    decode: LegCall
    prefill: LegCall | None


class Dispatch:
    """Sends legs to workers, over channels that are kept by address."""

    def __init__(self, channels: Channels, rng: random.Random) -> None:
        self._channels = channels
        self._rng = rng

    def send(
        self, route: Route, leg: leg_pb2.LegRequest, attempt: int, timeout_s: float | None, headers: Headers = ()
    ) -> Dispatched:
        """Send the legs of one attempt.

        Args:
            route: who serves it.
            leg: what both legs share: everything but attempt, epoch and bootstrap.
            attempt: its number, from 1.
            timeout_s: what is left of the client's deadline; None: no deadline.
            headers: what tells the workers which trace the legs belong to.
        """
        if route.prefill is None:
            decode_leg = _addressed(leg, route.decode, attempt, None)
            decode = open_decode(self._channels, route.decode.address, decode_leg, timeout_s, headers)
            return Dispatched(route, attempt, 0, decode, None)
        room = self._rng.getrandbits(ROOM_BITS) or 1
        prefill_host, prefill_port = route.prefill.bootstrap_host, route.prefill.bootstrap_port
        assert prefill_host is not None, "the registry refuses prefill workers without a bootstrap address"
        assert prefill_port is not None, "the registry refuses prefill workers without a bootstrap address"
        bootstrap = leg_pb2.Bootstrap(host=prefill_host, port=prefill_port, room=room)
        # Decode has the longer way before it can receive: it goes first.
        decode_leg = _addressed(leg, route.decode, attempt, bootstrap)
        decode = open_decode(self._channels, route.decode.address, decode_leg, timeout_s, headers)
        prefill_leg = _addressed(leg, route.prefill, attempt, bootstrap)
        prefill = open_prefill(self._channels, route.prefill.address, prefill_leg, timeout_s, headers)
        return Dispatched(route, attempt, room, decode, prefill)


def _addressed(
    leg: leg_pb2.LegRequest, worker: Worker, attempt: int, bootstrap: leg_pb2.Bootstrap | None
) -> leg_pb2.LegRequest:
    addressed = leg_pb2.LegRequest()
    addressed.CopyFrom(leg)
    addressed.attempt = attempt
    addressed.worker_epoch = worker.epoch
    if bootstrap is not None:
        addressed.bootstrap.CopyFrom(bootstrap)
    return addressed
