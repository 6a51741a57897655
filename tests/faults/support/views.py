"""What every registry lists and every frontend counts, again and again, with the time of each look.

Owns the looks and what can be asked of them afterwards. One look every twentieth of a second: a moment in which two
workers stood at one address does not escape, and the time a change took is known well enough for bounds in leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from tandem.api.frontend.v1 import inference_service_pb2 as frontend_pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support.history import now_s

LOOK_EVERY_S = 0.05
ANSWER_S = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """What one registry listed, or one frontend counted, at one moment."""

    time_s: float
    place: str
    """host:port that was asked."""
    epochs: dict[str, int] | None
    """Of a registry: epoch by worker id. None: it did not answer, or it is a frontend."""
    addresses: tuple[str, ...] = ()
    counts: tuple[int, int] | None = None
    """Of a frontend: prefill and decode workers. None: it did not answer, or it is a registry."""
    source: int = pb.VIEW_SOURCE_UNSPECIFIED


@dataclass
class Views:
    """All looks so far."""

    registries: Sequence[str]
    frontends: Sequence[str]
    looks: list[Look] = field(default_factory=list)

    def last(self, place: str) -> Look | None:
        """The newest look at a place."""
        return next((look for look in reversed(self.looks) if look.place == place), None)

    def show(self, workers: Collection[str], asked: Collection[str] | None = None) -> bool:
        """Whether all those asked, or all processes, know exactly these workers now."""
        counts = tuple(sum(name.startswith(role) for name in workers) for role in ("prefill", "decode"))
        for place in asked or (*self.registries, *self.frontends):
            look = self.last(place)
            if look is None:
                return False
            if place in self.registries and set(look.epochs or ()) != set(workers):
                return False
            if place in self.frontends and look.counts != counts:
                return False
        return True

    async def all_show(
        self, workers: Collection[str], *, within_s: float, asked: Collection[str] | None = None
    ) -> float:
        """Return when all those asked know exactly these workers; how long it took."""
        begin_s = now_s()
        await assert_eventually(
            lambda: (self.show(workers, asked), self._known()),
            lambda found: found[0],
            within_s=within_s,
            every_s=LOOK_EVERY_S / 2,
            what=f"a view of {sorted(workers)} everywhere",
        )
        return now_s() - begin_s

    def epoch(self, worker_id: str) -> int:
        """The epoch under which a registry listed a worker last."""
        listed = (look.epochs[worker_id] for look in reversed(self.looks) if look.epochs and worker_id in look.epochs)
        found = next(listed, None)
        assert found is not None, f"no registry has listed {worker_id}"
        return found

    def sources(self) -> set[int]:
        """Where the views of the registries that answer come from now."""
        looks = [self.last(place) for place in self.registries]
        return {look.source for look in looks if look is not None and look.epochs is not None}

    def _known(self) -> str:
        looks = [self.last(place) for place in (*self.registries, *self.frontends)]
        return "; ".join(
            f"{look.place}: {sorted(look.epochs) if look.epochs is not None else look.counts}" for look in looks if look
        )


@asynccontextmanager
async def watched_views(registries: Sequence[str], frontends: Sequence[str]) -> AsyncIterator[Views]:
    """Look as long as the block runs."""
    views = Views(registries, frontends)
    async with AsyncExitStack() as stack:
        tasks = []
        for place in (*registries, *frontends):
            channel = await stack.enter_async_context(open_channel(place))
            look = _registry_look if place in registries else _frontend_look
            tasks.append(asyncio.create_task(_look_on(views, place, channel, look), name=f"look-{place}"))
        try:
            yield views
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _look_on(views: Views, place: str, channel: grpc.aio.Channel, look: Any) -> None:
    while True:
        try:
            views.looks.append(await look(place, channel))
        except grpc.aio.AioRpcError:
            views.looks.append(Look(now_s(), place, None))
        await asyncio.sleep(LOOK_EVERY_S)


async def _registry_look(place: str, channel: grpc.aio.Channel) -> Look:
    stub: Any = RegistryServiceStub(channel)
    answer = await stub.List(pb.ListRequest(), timeout=ANSWER_S)
    workers = [entry.worker for entry in answer.workers]
    epochs = {worker.worker_id: worker.epoch for worker in workers}
    return Look(now_s(), place, epochs, tuple(worker.address for worker in workers), None, answer.source)


async def _frontend_look(place: str, channel: grpc.aio.Channel) -> Look:
    stub: Any = InferenceServiceStub(channel)
    answer = await stub.ListModels(frontend_pb.ListModelsRequest(), timeout=ANSWER_S)
    # A model that no worker serves is not offered.
    counts = [(model.prefill_workers, model.decode_workers) for model in answer.models] or [(0, 0)]
    return Look(now_s(), place, None, (), counts[0])
