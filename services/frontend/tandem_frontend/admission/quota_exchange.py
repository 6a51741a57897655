"""The exchange of what tenants with quotas have used: between the processes of a frontend, and between frontends.

Owns who reports what to whom. Each process follows its siblings over their private sockets, and one process of each
other frontend, which reports for its siblings too: nothing travels further than that. It follows no process before the
first caller with a quota has come, so that a cluster without quotas pays nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, Protocol

from tandem.api.frontend.v1 import quota_service_pb2 as pb
from tandem.api.frontend.v1 import quota_service_pb2_grpc as pb_grpc
from tandem.client.spending_watch import SpendingWatch, spending_to_proto
from tandem.domain.frontend import Frontend
from tandem.domain.quota import Spending
from tandem.rpc.channels import Channels
from tandem.tls.paths import Tls
from tandem_frontend.admission.quotas import Quotas

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["QuotaService"].full_name
GATHER_S = 0.05
"""Changes within it are sent together. Others know of a request so much later, and of one that a sibling of theirs
reports to them after twice that."""

Key = tuple[str, str]
"""Source and tenant."""


class FrontendList(Protocol):
    """The frontends that the registry lists: a `tandem.discovery.watches.FrontendWatch`."""

    @property
    def next_change(self) -> asyncio.Event:
        """Set at the next change."""
        ...

    def frontends(self) -> Iterable[Frontend]:
        """All of them."""
        ...


class _Watcher:
    """One open stream: what has changed since its last message."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = dict.fromkeys(keys)
        self.has_changed = asyncio.Event()


class QuotaExchange:
    """Reports what this process knows, and follows the others."""

    def __init__(
        self,
        quotas: Quotas,
        siblings: Iterable[str] = (),
        tls: Tls | None = None,
        *,
        frontend_id: str = "",
        gather_s: float = GATHER_S,
    ) -> None:
        """Makes no connection yet. `siblings`: addresses of the other processes of this frontend, `frontend_id`."""
        self.quotas = quotas
        self._siblings = list(siblings)
        self._frontend_id = frontend_id
        self._gather_s = gather_s
        self._channels, self._sibling_channels = Channels(tls), Channels()
        self._frontends_watch = SpendingWatch(self._channels, self._apply, quotas.lost)
        self._siblings_watch = SpendingWatch(self._sibling_channels, self._apply_sibling, self._lose_siblings)
        self._sibling_sources: set[str] = set()
        self._watchers: set[_Watcher] = set()
        self._own_watchers: set[_Watcher] = set()
        """Of siblings."""
        self._wanted = asyncio.Event()
        quotas.on_change = self._note_change

    @property
    def is_following(self) -> bool:
        """Whether `begin` was called."""
        return self._wanted.is_set()

    def begin(self) -> None:
        """A caller with a quota has come: follow the others from now on."""
        self._wanted.set()

    async def follow(self, list_frontends: Callable[[], contextlib.AbstractAsyncContextManager[FrontendList]]) -> None:
        """Follow the siblings and all other frontends once `begin` was called, until cancelled.

        `list_frontends` opens a `FrontendWatch`.
        """
        await self._wanted.wait()
        self._siblings_watch.follow(self._siblings)
        async with list_frontends() as listed:
            while True:
                changed = listed.next_change
                others = {one.address for one in listed.frontends() if one.frontend_id != self._frontend_id}
                self._frontends_watch.follow(others)
                self._channels.keep_only(others)
                await changed.wait()

    async def close(self) -> None:
        """End all streams to others."""
        for part in (self._frontends_watch, self._siblings_watch, self._channels, self._sibling_channels):
            await part.close()

    async def spending(self, *, own_only: bool) -> AsyncGenerator[pb.WatchSpendingResponse]:
        """What this process has admitted, and unless `own_only` its siblings: all of it, then each change."""
        if not own_only:
            # Another frontend counts on this process for what its siblings admit.
            self.begin()
        watchers = self._own_watchers if own_only else self._watchers
        watcher = _Watcher(key for key in self.quotas.known_keys() if self._is_reported(key, own_only=own_only))
        watchers.add(watcher)
        try:
            while True:
                watcher.has_changed.clear()
                keys, watcher.keys = watcher.keys, {}
                yield self._message(keys, own_only=own_only)
                await watcher.has_changed.wait()
                await asyncio.sleep(self._gather_s)
        finally:
            watchers.discard(watcher)

    def _message(self, keys: Iterable[Key], *, own_only: bool) -> pb.WatchSpendingResponse:
        sources = [self.quotas.source, *(() if own_only else sorted(self._sibling_sources))]
        known = (self.quotas.known(*key) for key in keys)
        return pb.WatchSpendingResponse(
            sources=sources, spending=[spending_to_proto(one) for one in known if one is not None]
        )

    def _is_reported(self, key: Key, *, own_only: bool) -> bool:
        return key[0] == self.quotas.source or (not own_only and key[0] in self._sibling_sources)

    def _note_change(self, source: str, tenant: str) -> None:
        key = source, tenant
        for watchers, own_only in ((self._own_watchers, True), (self._watchers, False)):
            if watchers and self._is_reported(key, own_only=own_only):
                for watcher in watchers:
                    watcher.keys[key] = None
                    watcher.has_changed.set()

    def _apply(self, sources: Sequence[str], spending: Sequence[Spending]) -> None:
        for one in spending:
            self.quotas.note(one)
        self.quotas.met(sources)

    def _apply_sibling(self, sources: Sequence[str], spending: Sequence[Spending]) -> None:
        if new := set(sources) - self._sibling_sources:
            self._sibling_sources |= new
            self._wake()
        self._apply(sources, spending)

    def _lose_siblings(self, sources: Iterable[str]) -> None:
        lost = set(sources)
        self.quotas.lost(lost)
        if lost:
            self._sibling_sources -= lost
            self._wake()

    def _wake(self) -> None:
        """Report for other sources from now on."""
        for watcher in self._watchers:
            watcher.has_changed.set()


class QuotaServicer(pb_grpc.QuotaServiceServicer):
    """The contract of quota_service.proto, for other frontends, or for siblings (`own_only`)."""

    def __init__(self, exchange: QuotaExchange, *, own_only: bool) -> None:
        self._exchange = exchange
        self._own_only = own_only

    async def WatchSpending(  # noqa: N802
        self, request: pb.WatchSpendingRequest, context: Any
    ) -> AsyncGenerator[pb.WatchSpendingResponse]:
        """What has been admitted, and each change; ends with the call."""
        async with contextlib.aclosing(self._exchange.spending(own_only=self._own_only)) as messages:
            async for message in messages:
                yield message
