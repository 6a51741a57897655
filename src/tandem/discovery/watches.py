"""Watches of a registry's workers and frontends: kept up to date, and kept when the registry is unreachable.

Owns what the streams say and who waits for it. The merge is `tandem.discovery.view`, trying registries in turn
`tandem.discovery.watch`. Chooses no worker.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.clock import Clock, monotonic
from tandem.discovery.view import CONFIRM_GRACE_S, FrontendView, M, ViewGap, WorkerView
from tandem.discovery.watch import SNAPSHOT_TIMEOUT_S, RegistryFollower
from tandem.domain.frontend import Frontend
from tandem.domain.worker import Worker
from tandem.errors import DeadlinePassed, RevisionAhead, ServiceError, TandemError
from tandem.rpc.convert import frontend_from_proto, worker_from_proto
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

W = TypeVar("W", worker_pb2.Worker, worker_pb2.Frontend)

AHEAD_PATIENCE_S = 3.0
"""Replicas that are behind catch up in less. Where all of them stay behind, what they have is the truth by now."""


class WorkerWatch(RegistryFollower):
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
        self._view = WorkerView(clock, confirm_grace_s)
        super().__init__(addresses, self._view, "workers", tls, clock, rng)
        self._on_change = on_change
        self._ahead_since_s: float | None = None
        """Since when registries have said that they know less than this watch."""
        self._workers: tuple[Worker, ...] = ()

    def workers(self) -> tuple[Worker, ...]:
        """All workers of the view, ordered by id."""
        return self._workers

    def unconfirmed(self) -> tuple[Worker, ...]:
        """Those among them that only a former registry listed."""
        return self._view.unconfirmed()

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

    def _note(self, problem: TandemError) -> None:
        if isinstance(problem, RevisionAhead) and self._ahead_since_s is None:
            self._ahead_since_s = self._clock()

    def _request(self) -> pb.WatchRequest:
        """What is known goes along, so that no replica that lags behind takes the view back in time."""
        request = pb.WatchRequest()
        is_patient = self._ahead_since_s is None or self._clock() - self._ahead_since_s < AHEAD_PATIENCE_S
        if self._view.registry_id is not None and is_patient:
            request.known_registry_id, request.known_revision = self._view.registry_id, self._view.revision
        return request

    def _open(self, stub: RegistryServiceStub) -> Any:
        return stub.Watch(self._request())

    async def _listen(self, call: Any, address: str) -> None:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
            first = await call.read()
        if not _is_step(first) or first.WhichOneof("event") != "snapshot":
            raise ServiceError("the stream did not begin with a snapshot")
        try:
            self._apply(first)
            self._ahead_since_s = None
            self._heard_from(address, first.registry_id)
            while _is_step(step := await call.read()):
                self._apply(step)
        except ViewGap as gap:
            raise ServiceError(str(gap)) from None

    def _count(self) -> int:
        return len(self._workers)

    def _apply(self, step: pb.WatchResponse) -> None:
        if step.WhichOneof("event") == "snapshot":
            self._view.apply_snapshot(
                step.registry_id, step.revision, _known(step.snapshot.workers, worker_from_proto, "worker")
            )
        else:
            removed = [(gone.worker_id, gone.epoch) for gone in step.delta.removed]
            previous = step.previous_revision if step.HasField("previous_revision") else step.revision - 1
            upserted = _known(step.delta.upserted, worker_from_proto, "worker")
            self._view.apply_delta(step.registry_id, previous, step.revision, upserted, removed)
        self._tell()

    def _tell(self) -> None:
        """Publish the view where it differs from the one published before; wake who waits in any case."""
        workers = self._view.members()
        if workers != self._workers:
            self._workers = workers
            if self._on_change is not None:
                self._on_change(workers)
        self._wake()


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
        return self._view.members()

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
        frontends = _known(heard.frontends, frontend_from_proto, "frontend")
        if not self._view.apply(heard.registry_id, heard.revision, frontends):
            log.warning("the registry lists no frontend any more; keeping %d known ones", len(self.frontends()))
        self._wake()


def _is_step(read: object) -> TypeGuard[pb.WatchResponse]:
    return isinstance(read, pb.WatchResponse)


def _is_list(read: object) -> TypeGuard[pb.WatchFrontendsResponse]:
    return isinstance(read, pb.WatchFrontendsResponse)


def _known(messages: Iterable[W], convert: Callable[[W], M], kind: str) -> list[M]:
    """Members in roles and states that this release knows; it could not call those of a newer one."""
    members = []
    for message in messages:
        try:
            members.append(convert(message))
        except KeyError as unknown:
            name = message.worker_id if isinstance(message, worker_pb2.Worker) else message.frontend_id
            log.warning("ignored %s %s: its role or state %s is unknown to this release", kind, name, unknown)
    return members
