"""Watches of a registry's workers and frontends. While no registry is reachable, the last known view is kept.

Owns the streams' messages and the waiting for changes. `tandem.discovery.view` merges, `tandem.discovery.watch`
reconnects. Chooses no worker.
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
"""Registries that lag catch up in less. If all of them stay behind for longer, their view is accepted."""


class WorkerWatch(RegistryFollower):
    """All workers that a registry lists, or listed last."""

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
            addresses: of registries, in the format of the settings; the next one is tried when one fails.
            tls: client certificate for a registry that requires one.
            on_change: called with all workers after each change of the view; must not raise.
            clock: for `state` and the grace period of unconfirmed workers.
            confirm_grace_s: how long an unconfirmed worker is kept once a registry is live.
            rng: jitter of reconnections.
        """
        self._view = WorkerView(clock, confirm_grace_s)
        super().__init__(addresses, self._view, "workers", tls, clock, rng)
        self._on_change = on_change
        self._ahead_since_s: float | None = None
        """Since when registries have rejected this watch with REVISION_AHEAD: their view is older."""
        self._workers: tuple[Worker, ...] = ()

    def workers(self) -> tuple[Worker, ...]:
        """All workers of the view, ordered by id."""
        return self._workers

    def unconfirmed(self) -> tuple[Worker, ...]:
        """Workers of the view that only a previous registry process listed."""
        return self._view.unconfirmed()

    async def wait_live(self) -> None:
        """Return once a registry has sent its view."""
        while not self._state.is_live:
            await self._changed.wait()

    async def wait_for(self, predicate: Callable[[tuple[Worker, ...]], object], timeout_s: float) -> tuple[Worker, ...]:
        """Return the workers once the predicate is true for them.

        Raises:
            DeadlinePassed: it was not within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(self._workers):
                    await self._changed.wait()
        except TimeoutError:
            known = ", ".join(worker.worker_id for worker in self._workers) or "none"
            raise DeadlinePassed(
                f"the expected workers did not register within {timeout_s:g} s (known: {known})"
            ) from None
        return self._workers

    def _note(self, problem: TandemError) -> None:
        if isinstance(problem, RevisionAhead) and self._ahead_since_s is None:
            self._ahead_since_s = self._clock()

    def _request(self) -> pb.WatchRequest:
        """Contains the known revision, so that a lagging replica rejects the watch instead of sending an older view."""
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
            raise ServiceError("the registry sent a change before its snapshot: it may run another release")
        try:
            self._apply(first)
            self._ahead_since_s = None
            self._on_live(address, first.registry_id)
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
        self._publish()

    def _publish(self) -> None:
        """Call `on_change` where the view differs from the last published one; wake waiting coroutines in any case."""
        workers = self._view.members()
        if workers != self._workers:
            self._workers = workers
            if self._on_change is not None:
                self._on_change(workers)
        self._wake()


class FrontendWatch(RegistryFollower):
    """All frontends that a registry lists, or listed last."""

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
            addresses: of registries, in the format of the settings; the next one is tried when one fails.
            tls: client certificate for a registry that requires one.
            clock: for `state` and the grace period of unconfirmed frontends.
            confirm_grace_s: how long an unconfirmed frontend is kept once a registry is live.
            rng: jitter of reconnections.
        """
        self._view = FrontendView(clock, confirm_grace_s)
        super().__init__(addresses, self._view, "frontends", tls, clock, rng)

    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, ordered by id."""
        return self._view.members()

    @property
    def next_change(self) -> asyncio.Event:
        """Set at the next change. Take it before reading the frontends, so that no change in between is missed."""
        return self._changed

    def _open(self, stub: RegistryServiceStub) -> Any:
        return stub.WatchFrontends(pb.WatchFrontendsRequest())

    async def _listen(self, call: Any, address: str) -> None:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
            message = await call.read()
        while _is_list(message):
            self._apply(message)
            if not self._state.is_live:
                self._on_live(address, message.registry_id)
            message = await call.read()

    def _count(self) -> int:
        return len(self.frontends())

    def _apply(self, message: pb.WatchFrontendsResponse) -> None:
        frontends = _known(message.frontends, frontend_from_proto, "frontend")
        if not self._view.apply(message.registry_id, message.revision, frontends):
            log.warning("the registry lists no frontends; keeping %d known ones", len(self.frontends()))
        self._wake()


def _is_step(read: object) -> TypeGuard[pb.WatchResponse]:
    return isinstance(read, pb.WatchResponse)


def _is_list(read: object) -> TypeGuard[pb.WatchFrontendsResponse]:
    return isinstance(read, pb.WatchFrontendsResponse)


def _known(messages: Iterable[W], convert: Callable[[W], M], kind: str) -> list[M]:
    """Members whose role and state this release knows; others are of a newer release, and it could not call them."""
    members = []
    for message in messages:
        try:
            members.append(convert(message))
        except KeyError as unknown:
            name = message.worker_id if isinstance(message, worker_pb2.Worker) else message.frontend_id
            log.warning(
                "ignored %s %s: this release does not know its role or state %s; run one release everywhere",
                kind,
                name,
                unknown,
            )
    return members
