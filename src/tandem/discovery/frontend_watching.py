"""The watch of edges: keeps the registry's list of frontends up to date, and keeps it when the registry is gone.

Owns what the stream says. The merge is `tandem.discovery.frontend_view`, trying registries in turn
`tandem.discovery.watch`. Sends no request to a frontend.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.clock import Clock, monotonic
from tandem.discovery.frontend_view import FrontendView
from tandem.discovery.view import CONFIRM_GRACE_S
from tandem.discovery.watch import SNAPSHOT_TIMEOUT_S, RegistryFollower
from tandem.domain.frontend import Frontend
from tandem.rpc.convert import frontend_from_proto
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)


class FrontendWatch(RegistryFollower):
    """All frontends a registry lists, or listed when it was last heard of."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        tls: Tls | None = None,
        clock: Clock = monotonic,
        confirm_grace_s: float = CONFIRM_GRACE_S,
        rng: random.Random | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            addresses: of registries, as settings have them; another one is tried when one fails.
            tls: what is presented to a registry that asks for certificates.
            clock: for `state` and the time of unconfirmed frontends.
            confirm_grace_s: how long a frontend may be missing from what is no proof of its absence.
            rng: spreads reconnections.
        """
        self._view = FrontendView(clock, confirm_grace_s)
        super().__init__(addresses, self._view, "frontends", tls, clock, rng)

    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, ordered by id."""
        return self._view.frontends()

    @property
    def next_change(self) -> asyncio.Event:
        """Set as soon as anything more is heard. Take it before looking, so that nothing is missed in between."""
        return self._changed

    def _open(self, stub: RegistryServiceStub) -> Any:
        return stub.WatchFrontends(pb.WatchFrontendsRequest())

    async def _listen(self, call: Any, address: str) -> None:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
            heard = await call.read()
        while _is_list(heard):
            self._apply(heard)
            if not self._state.is_live:
                self._heard_from(address, heard.registry_id)
            heard = await call.read()

    def _count(self) -> int:
        return len(self.frontends())

    def _apply(self, heard: pb.WatchFrontendsResponse) -> None:
        frontends = _readable(heard.frontends)
        if not self._view.apply(heard.registry_id, heard.revision, frontends):
            log.warning("the registry lists no frontend any more; keeping %d known ones", len(self.frontends()))
        self._wake()


def _is_list(read: object) -> TypeGuard[pb.WatchFrontendsResponse]:
    return isinstance(read, pb.WatchFrontendsResponse)


def _readable(messages: Iterable[worker_pb2.Frontend]) -> list[Frontend]:
    """Frontends in states that this release knows; one in a newer state is nothing it could send requests to."""
    frontends = []
    for message in messages:
        try:
            frontends.append(frontend_from_proto(message))
        except KeyError as unknown:
            log.warning("frontend %s is in an unknown state (%s) and is ignored", message.frontend_id, unknown)
    return frontends
