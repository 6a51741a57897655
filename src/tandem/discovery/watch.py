"""Shared part of all registry watches: reconnects to the addresses in turn, logs an outage once, and drops members
that a live registry does not confirm in time.

Owns the tasks, the connections and the state. Each watch handles the messages of its own stream.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.clock import Clock
from tandem.discovery.address_book import AddressBook
from tandem.errors import ServiceError, TandemError
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_rpc_error
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S = 3.0
"""Timeout of the first message: a frozen registry accepts connections but never responds; then the next is tried."""


@dataclass(frozen=True, slots=True)
class WatchState:
    """Whether the view is live, that is connected to a registry, and since when (on the watch's clock)."""

    is_live: bool
    since_s: float


class AgingView(Protocol):
    """A view that keeps unconfirmed members for a grace period."""

    def next_drop_s(self) -> float | None:
        """When the next grace period ends, on the view's clock; None: all members are confirmed."""
        ...

    def drop_overdue(self) -> bool:
        """Remove the members whose grace period is over. Returns whether there were any."""
        ...


class RegistryFollower(abc.ABC):
    """Watches one registry, and reconnects to another one when the stream ends."""

    def __init__(
        self,
        addresses: Sequence[str],
        view: AgingView,
        listed: str,
        tls: Tls | None,
        clock: Clock,
        rng: random.Random | None,
    ) -> None:
        """Makes no connection yet. `listed` names the members in log lines, in the plural."""
        self._book = AddressBook(addresses, clock=clock, rng=rng)
        self._aging = view
        self._listed = listed
        self._clock = clock
        self._backoff = Backoff(rng=rng)
        self._state = WatchState(is_live=False, since_s=clock())
        self._changed = asyncio.Event()
        self._channels = Channels(tls)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> WatchState:
        """Whether the view is live or last known, and since when."""
        return self._state

    async def start(self) -> None:
        """Start the tasks; returns at once, whether or not a registry is reachable."""
        assert not self._tasks, "start() twice"
        self._tasks = [
            asyncio.create_task(self._follow(), name=f"watch-of-{self._listed}"),
            asyncio.create_task(self._drop_overdue(), name=f"overdue-{self._listed}"),
        ]

    async def close(self) -> None:
        """Stop the tasks and free all resources; the last view stays readable. May be called twice."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channels.close()

    @abc.abstractmethod
    def _open(self, stub: RegistryServiceStub) -> Any:
        """Open the stream."""

    @abc.abstractmethod
    async def _listen(self, call: Any, address: str) -> None:
        """Read the stream to its end; calls `_on_live` once there is a complete view.

        Raises:
            TimeoutError: no message within SNAPSHOT_TIMEOUT_S.
            TandemError: a message is invalid.
        """

    @abc.abstractmethod
    def _count(self) -> int:
        """Number of members in the view."""

    def _note(self, problem: TandemError) -> None:  # noqa: B027 -- optional hook
        """A stream has ended with this error."""

    def _publish(self) -> None:
        """Report a change of the view."""
        self._wake()

    def _wake(self) -> None:
        """Wake the coroutines that wait for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _on_live(self, address: str, registry_id: str) -> None:
        """A registry has sent its view: an outage is over."""
        self._set_live(True)
        self._backoff.reset()
        log.info("registry %s: watching (registry id %s), %d %s", address, registry_id, self._count(), self._listed)

    async def _follow(self) -> None:
        """Watch the addresses in turn for ever; logs the start and the end of an outage once each."""
        is_outage_logged = False
        while True:
            retry_delay_s = 0.0
            try:
                await self._watch(await self._book.current())
            except TandemError as problem:
                self._note(problem)
                if self._state.is_live or not is_outage_logged:
                    log.warning(
                        "registry %s: %s; keeping %d known %s", self._book, problem, self._count(), self._listed
                    )
                    is_outage_logged = True
                self._set_live(False)
                retry_delay_s = problem.retry_delay_s or 0.0
            self._book.failed()
            await asyncio.sleep(max(retry_delay_s, self._backoff.next_s()))

    async def _watch(self, address: str) -> None:
        """Read one stream to its end, which always raises: a registry never closes it without a failure."""
        call = self._open(RegistryServiceStub(self._channels.get(address)))
        try:
            await self._listen(call, address)
            raise ServiceError("the registry closed the watch")
        except TimeoutError:
            raise ServiceError(f"no list of {self._listed} received within {SNAPSHOT_TIMEOUT_S:g} s") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    def _set_live(self, is_live: bool) -> None:
        if is_live != self._state.is_live:
            self._state = WatchState(is_live, self._clock())
            self._wake()

    async def _drop_overdue(self) -> None:
        """Drop members that a live registry did not confirm in time. During an outage none is dropped."""
        while True:
            changed, next_s = self._changed, self._aging.next_drop_s()
            wait_s = None
            if self._state.is_live and next_s is not None:
                if self._aging.drop_overdue():
                    self._publish()
                    continue
                wait_s = max(0.0, next_s - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()
