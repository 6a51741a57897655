"""What all watches of a registry share: trying its addresses in turn for ever, telling an outage once, giving up in
time what a live registry does not confirm.

Owns the tasks, the connections and the state. What is heard, and what becomes of it, is each watch's own.
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
"""A registry that is frozen accepts connections and never answers; the next address gets its turn after this."""


@dataclass(frozen=True, slots=True)
class WatchState:
    """Whether the view follows a registry now, and since when it does or does not (on the watch's clock)."""

    is_live: bool
    since_s: float


class AgingView(Protocol):
    """A view that holds on for a while to what was not confirmed."""

    def next_drop_s(self) -> float | None:
        """When the next one is overdue, on the view's clock; None: all are confirmed."""
        ...

    def drop_overdue(self) -> bool:
        """Give up who is overdue now. Returns whether there was anyone."""
        ...


class RegistryFollower(abc.ABC):
    """Follows one stream of a registry, and another registry's when it ends."""

    def __init__(
        self,
        addresses: Sequence[str],
        view: AgingView,
        listed: str,
        tls: Tls | None,
        clock: Clock,
        rng: random.Random | None,
    ) -> None:
        """Makes no connection yet. `listed` says in logs what the view is of, in the plural."""
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
        """Live, or the last known view and since when."""
        return self._state

    async def start(self) -> None:
        """Begin to follow; returns at once, whether or not a registry can be reached."""
        assert not self._tasks, "start() twice"
        self._tasks = [
            asyncio.create_task(self._follow(), name=f"watch-of-{self._listed}"),
            asyncio.create_task(self._drop_overdue(), name=f"overdue-{self._listed}"),
        ]

    async def close(self) -> None:
        """Stop following and free everything; the last view stays readable. May be called twice."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channels.close()

    @abc.abstractmethod
    def _open(self, stub: RegistryServiceStub) -> Any:
        """The call whose answers are listened to."""

    @abc.abstractmethod
    async def _listen(self, call: Any, address: str) -> None:
        """Hear the stream to its end; calls `_heard_from` once a view has been told.

        Raises:
            TimeoutError: nothing came within SNAPSHOT_TIMEOUT_S.
            TandemError: what came makes no sense.
        """

    @abc.abstractmethod
    def _count(self) -> int:
        """How many the view knows."""

    def _note(self, problem: TandemError) -> None:  # noqa: B027 -- most have nothing to add
        """A stream has ended with this."""

    def _tell(self) -> None:
        """The view has changed."""
        self._wake()

    def _wake(self) -> None:
        """Whoever waits for anything more looks now."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _heard_from(self, address: str, registry_id: str) -> None:
        """A registry has told its view: the outage, if there was one, is over."""
        self._set_live(True)
        self._backoff.reset()
        log.info("registry %s: following %s, %d %s", address, registry_id, self._count(), self._listed)

    async def _follow(self) -> None:
        """Try the addresses in turn for ever; one line in the log for an outage, one for its end."""
        is_outage_told = False
        while True:
            asked_s = 0.0
            try:
                await self._watch(await self._book.current())
            except TandemError as problem:
                self._note(problem)
                if self._state.is_live or not is_outage_told:
                    log.warning(
                        "registry %s: %s; keeping %d known %s", self._book, problem, self._count(), self._listed
                    )
                    is_outage_told = True
                self._set_live(False)
                asked_s = problem.retry_delay_s or 0.0
            self._book.failed()
            await asyncio.sleep(max(asked_s, self._backoff.next_s()))

    async def _watch(self, address: str) -> None:
        """Follow one stream to its end, which is always an error."""
        call = self._open(RegistryServiceStub(self._channels.get(address)))
        try:
            await self._listen(call, address)
            raise ServiceError("the registry ended the stream")
        except TimeoutError:
            raise ServiceError(f"no {self._listed} within {SNAPSHOT_TIMEOUT_S:g} s") from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    def _set_live(self, is_live: bool) -> None:
        if is_live != self._state.is_live:
            self._state = WatchState(is_live, self._clock())
            self._wake()

    async def _drop_overdue(self) -> None:
        """Give up those that a live registry did not confirm in time. Nobody is given up during an outage."""
        while True:
            changed, next_s = self._changed, self._aging.next_drop_s()
            wait_s = None
            if self._state.is_live and next_s is not None:
                if self._aging.drop_overdue():
                    self._tell()
                    continue
                wait_s = max(0.0, next_s - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()
