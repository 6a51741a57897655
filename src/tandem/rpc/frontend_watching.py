"""The watch of edges: keeps the registry's list of frontends up to date, and keeps it when the registry is gone.

Owns the stream and the waiting. The merge is `tandem.rpc.frontend_view`, the order of addresses
`tandem.rpc.address_book`. Sends no request to a frontend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import grpc

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.errors import ServiceError, TandemError
from tandem.model.frontend import Frontend
from tandem.rpc.address_book import AddressBook
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.frontend_view import FrontendView
from tandem.rpc.messages import frontend_from_proto
from tandem.rpc.registry_view import CONFIRM_GRACE_S
from tandem.rpc.status import from_rpc_error
from tandem.rpc.watching import SNAPSHOT_TIMEOUT_S, WatchState
from tandem.runtime.clock import Clock, monotonic
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)


class FrontendWatch:
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
        self._book = AddressBook(addresses, clock=clock, rng=rng)
        self._clock = clock
        self._view = FrontendView(clock, confirm_grace_s)
        self._backoff = Backoff(rng=rng)
        self._state = WatchState(is_live=False, since_s=clock())
        self._changed = asyncio.Event()
        self._channels = Channels(tls)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> WatchState:
        """Live, or the last known list and since when."""
        return self._state

    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, ordered by id."""
        return self._view.frontends()

    async def start(self) -> None:
        """Begin to follow; returns at once, whether or not a registry can be reached."""
        assert not self._tasks, "start() twice"
        self._tasks = [
            asyncio.create_task(self._follow(), name="frontend-watch"),
            asyncio.create_task(self._drop_overdue(), name="frontend-watch-overdue"),
        ]

    async def close(self) -> None:
        """Stop following and free everything; the last list stays readable. May be called twice."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channels.close()

    @property
    def next_change(self) -> asyncio.Event:
        """Set as soon as anything more is heard. Take it before looking, so that nothing is missed in between."""
        return self._changed

    async def _follow(self) -> None:
        """Try the addresses in turn for ever; one line in the log for an outage, one for its end."""
        is_outage_told = False
        while True:
            asked_s = 0.0
            try:
                await self._watch(await self._book.current())
            except TandemError as problem:
                if self._state.is_live or not is_outage_told:
                    known = len(self.frontends())
                    log.warning("registry %s: %s; keeping %d known frontends", self._book, problem, known)
                    is_outage_told = True
                self._set_live(False)
                asked_s = problem.retry_delay_s or 0.0
            self._book.failed()
            await asyncio.sleep(max(asked_s, self._backoff.next_s()))

    async def _watch(self, address: str) -> None:
        """Follow one stream to its end, which is always an error."""
        call = RegistryServiceStub(self._channels.get(address)).WatchFrontends(pb.WatchFrontendsRequest())
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                heard = await call.read()
            while _is_list(heard):
                self._apply(heard)
                if not self._state.is_live:
                    self._set_live(True)
                    self._backoff.reset()
                    log.info(
                        "registry %s: following %s, %d frontends", address, heard.registry_id, len(heard.frontends)
                    )
                heard = await call.read()
            raise ServiceError("the registry ended the stream")
        except TimeoutError:
            raise ServiceError(f"no frontends within {SNAPSHOT_TIMEOUT_S:g} s") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    def _apply(self, heard: pb.WatchFrontendsResponse) -> None:
        frontends = _readable(heard.frontends)
        if not self._view.apply(heard.registry_id, heard.revision, frontends):
            log.warning("the registry lists no frontend any more; keeping %d known ones", len(self.frontends()))
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _set_live(self, is_live: bool) -> None:
        if is_live != self._state.is_live:
            self._state = WatchState(is_live, self._clock())
            self._wake()

    async def _drop_overdue(self) -> None:
        """Give up frontends that a live registry did not confirm in time. Nobody is given up during an outage."""
        while True:
            changed, next_s = self._changed, self._view.next_drop_s()
            wait_s = None
            if self._state.is_live and next_s is not None:
                if self._view.drop_overdue():
                    self._wake()
                    continue
                wait_s = max(0.0, next_s - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()


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
