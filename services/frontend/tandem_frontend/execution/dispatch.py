"""Dispatch: starts the one or two legs of an attempt at the same time.

Draws the bootstrap room by which the two legs find each other. `attempt` supervises them afterwards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from tandem.api.types.v1 import leg_pb2
from tandem.domain.adapter import named
from tandem.domain.worker import Worker
from tandem.observability.trace_context import Headers
from tandem_frontend.execution.link_leg import Sink
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.routing.candidates import Route

ROOM_BITS = 63


class LegHandle(Protocol):
    """A started leg."""

    def abort(self) -> None:
        """Abort it; its sink gets no more events. Does nothing after its end."""
        ...


@dataclass(frozen=True, slots=True)
class Dispatched:
    """An attempt whose legs were sent."""

    route: Route
    attempt: int
    room: int
    """SGLang's bootstrap room; 0 on an aggregated route."""
    decode: LegHandle
    prefill: LegHandle | None


class Dispatch:
    """Starts legs at workers."""

    def __init__(self, links: WorkerLinks, rng: random.Random) -> None:
        self._links = links
        self._rng = rng

    def send(
        self,
        route: Route,
        leg: leg_pb2.LegRequest,
        attempt: int,
        sinks: tuple[Sink, Sink | None],
        timeout_s: float | None,
        headers: Headers = (),
    ) -> Dispatched:
        """Start the legs of one attempt.

        Args:
            route: the workers that serve it.
            leg: what both legs share: everything but attempt, epoch and bootstrap.
            attempt: its number, from 1.
            sinks: get the events of the decode (or aggregated) leg, and of the prefill leg where there is one.
            timeout_s: seconds left of the client's deadline; None: no deadline.
            headers: trace context of the legs.

        Raises:
            ServiceError: a worker cannot be connected to.
        """
        decode_link = self._links.get(route.decode)
        if route.prefill is None:
            decode_leg = _addressed(leg, route.decode, attempt, None, route.expected_cached_tokens)
            return Dispatched(route, attempt, 0, decode_link.start(decode_leg, sinks[0], timeout_s, headers), None)
        prefill_link, prefill_sink = self._links.get(route.prefill), sinks[1]
        assert prefill_sink is not None, "an attempt on a pair has two sinks"
        room = self._rng.getrandbits(ROOM_BITS) or 1
        prefill_host, prefill_port = route.prefill.bootstrap_host, route.prefill.bootstrap_port
        assert prefill_host is not None, "the registry refuses prefill workers without a bootstrap address"
        assert prefill_port is not None, "the registry refuses prefill workers without a bootstrap address"
        bootstrap = leg_pb2.Bootstrap(host=prefill_host, port=prefill_port, room=room)
        # Decode goes first: it must connect and allocate KV before prefill can transfer.
        decode = decode_link.start(_addressed(leg, route.decode, attempt, bootstrap), sinks[0], timeout_s, headers)
        prefill_leg = _addressed(leg, route.prefill, attempt, bootstrap, route.expected_cached_tokens)
        prefill = prefill_link.start(prefill_leg, prefill_sink, timeout_s, headers)
        return Dispatched(route, attempt, room, decode, prefill)


def _addressed(
    leg: leg_pb2.LegRequest,
    worker: Worker,
    attempt: int,
    bootstrap: leg_pb2.Bootstrap | None,
    expected_cached_tokens: int | None = None,
) -> leg_pb2.LegRequest:
    addressed = leg_pb2.LegRequest()
    addressed.CopyFrom(leg)
    addressed.attempt = attempt
    addressed.worker_epoch = worker.epoch
    if leg.HasField("adapter") and (adapter := named(worker.adapters, leg.adapter.name)) is not None:
        addressed.adapter.digest = adapter.digest
    if expected_cached_tokens:
        addressed.expected_cached_tokens = expected_cached_tokens
    if bootstrap is not None:
        addressed.bootstrap.CopyFrom(bootstrap)
    return addressed
