"""The watch of frontends and tools: keeps a registry's view up to date, and keeps it when the registry is gone.

Owns the stream and the waiting. The merge is `tandem.rpc.registry_view`, the order of addresses
`tandem.rpc.address_book`. Chooses no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import grpc

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.errors import DeadlinePassed, RevisionAhead, ServiceError, TandemError
from tandem.model.worker import Worker
from tandem.rpc.address_book import AddressBook
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.rpc.messages import worker_from_proto
from tandem.rpc.registry_view import CONFIRM_GRACE_S, RegistryView, ViewGap
from tandem.rpc.status import from_rpc_error
from tandem.runtime.clock import Clock, monotonic
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S = 3.0
"""A registry that is frozen accepts connections and never answers; the next address gets its turn after this."""
AHEAD_PATIENCE_S = 3.0
"""Replicas that are behind catch up in less. Where all of them stay behind, what they have is the truth by now."""


@dataclass(frozen=True, slots=True)
class WatchState:
    """Whether the view follows a registry now, and since when it does or does not (on the watch's clock)."""

    is_live: bool
    since_s: float


class WorkerWatch:
    """All workers a registry lists, or listed when it was last heard of."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        tls: Tls | None = None,
        on_change: Callable[[tuple[Worker, ...]], None] | None = None,
        clock: Clock = monotonic,
        confirm_grace_s: float = CONFIRM_GRACE_S,
        rng: random.Random | None = None,
    ) -> None:
        """Makes no connection yet.

        Args:
            addresses: of registries, as settings have them; another one is tried when one fails.
            tls: what is presented to a registry that asks for certificates.
            on_change: called with all workers after each change of the view; must not raise.
            clock: for `state` and the time of unconfirmed workers.
            confirm_grace_s: how long a worker may be missing from what is no proof of its absence.
            rng: spreads reconnections.
        """
        self._book = AddressBook(addresses, clock=clock, rng=rng)
        self._on_change = on_change
        self._clock = clock
        self._view = RegistryView(clock, confirm_grace_s)
        self._backoff = Backoff(rng=rng)
        self._state = WatchState(is_live=False, since_s=clock())
        self._ahead_since_s: float | None = None
        """Since when registries have said that they know less than this watch."""
        self._workers: tuple[Worker, ...] = ()
        self._changed = asyncio.Event()
        self._channels = Channels(tls)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> WatchState:
        """Live, or the last known view and since when."""
        return self._state

    def workers(self) -> tuple[Worker, ...]:
        """All workers of the view, ordered by id."""
        return self._workers

    def unconfirmed(self) -> tuple[Worker, ...]:
        """Those among them that only a former registry listed."""
        return self._view.unconfirmed()

    async def start(self) -> None:
        """Begin to follow; returns at once, whether or not a registry can be reached."""
        assert not self._tasks, "start() twice"
        self._tasks = [
            asyncio.create_task(self._follow(), name="registry-watch"),
            asyncio.create_task(self._drop_overdue(), name="registry-watch-overdue"),
        ]

    async def close(self) -> None:
        """Stop following and free everything; the last view stays readable. May be called twice."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channels.close()

    async def wait_live(self) -> None:
        """Return when a registry has told its view."""
        while not self._state.is_live:
            await self._changed.wait()

    async def wait_for(self, predicate: Callable[[tuple[Worker, ...]], object], timeout_s: float) -> tuple[Worker, ...]:
        """Return the workers as soon as the predicate accepts them.

        Raises:
            DeadlinePassed: it did not within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(self._workers):
                    await self._changed.wait()
        except TimeoutError:
            known = ", ".join(worker.worker_id for worker in self._workers) or "none"
            raise DeadlinePassed(
                f"the workers waited for did not come within {timeout_s:g} s (known: {known})"
            ) from None
        return self._workers

    async def _follow(self) -> None:
        """Try the addresses in turn for ever; one line in the log for an outage, one for its end."""
        is_outage_told = False
        while True:
            asked_s = 0.0
            try:
                await self._watch(await self._book.current())
            except TandemError as problem:
                if isinstance(problem, RevisionAhead):
                    self._note_ahead()
                if self._state.is_live or not is_outage_told:
                    log.warning("registry %s: %s; keeping %d known workers", self._book, problem, len(self._workers))
                    is_outage_told = True
                self._set_live(False)
                asked_s = problem.retry_delay_s or 0.0
            self._book.failed()
            await asyncio.sleep(max(asked_s, self._backoff.next_s()))

    def _note_ahead(self) -> None:
        if self._ahead_since_s is None:
            self._ahead_since_s = self._clock()

    def _request(self) -> pb.WatchRequest:
        """What is known goes along, so that no replica that lags behind takes the view back in time."""
        request = pb.WatchRequest()
        is_patient = self._ahead_since_s is None or self._clock() - self._ahead_since_s < AHEAD_PATIENCE_S
        if self._view.registry_id is not None and is_patient:
            request.known_registry_id, request.known_revision = self._view.registry_id, self._view.revision
        return request

    async def _watch(self, address: str) -> None:
        """Follow one stream to its end, which is always an error."""
        call = RegistryServiceStub(self._channels.get(address)).Watch(self._request())
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                first = await call.read()
            if not _is_step(first) or first.WhichOneof("event") != "snapshot":
                raise ServiceError("the stream did not begin with a snapshot")
            self._apply(first)
            self._ahead_since_s = None
            self._set_live(True)
            self._backoff.reset()
            log.info("registry %s: following %s, %d workers", address, first.registry_id, len(self._workers))
            while _is_step(step := await call.read()):
                self._apply(step)
            raise ServiceError("the registry ended the stream")
        except TimeoutError:
            raise ServiceError(f"no snapshot within {SNAPSHOT_TIMEOUT_S:g} s") from None
        except ViewGap as gap:
            raise ServiceError(str(gap)) from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    def _apply(self, step: pb.WatchResponse) -> None:
        if step.WhichOneof("event") == "snapshot":
            self._view.apply_snapshot(step.registry_id, step.revision, _readable(step.snapshot.workers))
        else:
            removed = [(gone.worker_id, gone.epoch) for gone in step.delta.removed]
            previous = step.previous_revision if step.HasField("previous_revision") else step.revision - 1
            upserted = _readable(step.delta.upserted)
            self._view.apply_delta(step.registry_id, previous, step.revision, upserted, removed)
        self._tell()

    def _tell(self) -> None:
        """Publish the view where it differs from the one published before; wake who waits in any case."""
        workers = self._view.workers()
        if workers != self._workers:
            self._workers = workers
            if self._on_change is not None:
                self._on_change(workers)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _set_live(self, is_live: bool) -> None:
        if is_live != self._state.is_live:
            self._state = WatchState(is_live, self._clock())
            self._wake()

    async def _drop_overdue(self) -> None:
        """Give up workers that a live registry did not confirm in time. Nobody is given up during an outage."""
        while True:
            changed, next_s = self._changed, self._view.next_drop_s()
            wait_s = None
            if self._state.is_live and next_s is not None:
                if self._view.drop_overdue():
                    self._tell()
                    continue
                wait_s = max(0.0, next_s - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()


def _is_step(read: object) -> TypeGuard[pb.WatchResponse]:
    return isinstance(read, pb.WatchResponse)


def _readable(messages: Iterable[worker_pb2.Worker]) -> list[Worker]:
    """Workers of roles and states that this release knows; a newer one's are nothing it could call."""
    workers = []
    for message in messages:
        try:
            workers.append(worker_from_proto(message))
        except KeyError as unknown:
            log.warning("worker %s is of an unknown role or state (%s) and is ignored", message.worker_id, unknown)
    return workers
