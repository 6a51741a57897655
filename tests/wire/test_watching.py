"""A watch among several registries: what it sends about itself, and which view it believes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.discovery import WorkerWatch, watches
from tandem.errors import RevisionAhead, TandemError
from tests.wire.support.registry_host import make_worker
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

A, B = make_worker("a"), make_worker("b")


def behind(request: pb.WatchRequest) -> TandemError | None:
    """A replica that has not seen yet what the watcher has."""
    return RevisionAhead("not yet") if request.HasField("known_revision") else None


@asynccontextmanager
async def watch_of(*registries: ScriptedRegistry, grace_s: float = 30.0) -> AsyncIterator[WorkerWatch]:
    async with AsyncExitStack() as stack:
        for registry in registries:
            await stack.enter_async_context(play_registry(registry))
        watch = WorkerWatch([registry.address for registry in registries], confirm_grace_s=grace_s)
        await watch.start()
        stack.push_async_callback(watch.close)
        yield watch


async def test_deltas_follow_the_revision_they_name() -> None:
    registry = ScriptedRegistry()
    registry.revision = 7
    async with watch_of(registry) as watch:
        await watch.wait_live()
        registry.step(7, 40, [A])
        registry.step(None, 41, [B])
        assert len(await watch.wait_for(lambda workers: len(workers) == 2, 5)) == 2
        assert len(registry.watched) == 1
        registry.workers, registry.revision = (A,), 60
        registry.step(50, 51)
        await watch.wait_for(lambda workers: len(workers) == 1, 5)
        assert len(registry.watched) == 2, "a step was missing: it began again"


async def test_a_watcher_says_what_it_knows_already() -> None:
    registry = ScriptedRegistry()
    registry.workers, registry.revision = (A,), 7
    async with watch_of(registry) as watch:
        await watch.wait_live()
        registry.step(7, 9, [B])
        await watch.wait_for(lambda workers: len(workers) == 2, 5)
        registry.workers, registry.revision = (B,), 10
        registry.step(77, 78)
        await watch.wait_for(lambda workers: len(workers) == 1, 5)
        assert not registry.watched[0].HasField("known_revision")
        assert not registry.watched[0].HasField("known_registry_id")
        known = registry.watched[1]
        assert (known.known_registry_id, known.known_revision) == ("scripted", 9)


async def test_a_registry_that_is_behind_passes_the_watcher_on() -> None:
    first, second = ScriptedRegistry(), ScriptedRegistry()
    first.workers, first.revision, first.watch_error = (A,), 7, behind
    second.workers, second.revision = (A, B), 8
    async with watch_of(first, second) as watch:
        await watch.wait_live()
        first.step(77, 78)
        await watch.wait_for(lambda workers: len(workers) == 2, 5)
        assert not watch.unconfirmed()


async def test_when_all_stay_behind_what_they_have_is_taken_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restore of the place where they keep it: the revision is lower, and it stays so."""
    monkeypatch.setattr(watches, "AHEAD_PATIENCE_S", 0.5)
    registry = ScriptedRegistry()
    registry.workers, registry.revision, registry.watch_error = (A, B), 7, behind
    async with watch_of(registry) as watch:
        await watch.wait_for(lambda workers: len(workers) == 2, 5)
        registry.workers, registry.revision = (B,), 3
        registry.step(77, 78)
        await watch.wait_for(lambda workers: watch.unconfirmed() == (A,), 10)
        assert watch.workers() == (A, B), "not listed by who knows less is no proof of absence"
        assert watch.state.is_live
        known = [request.HasField("known_revision") for request in registry.watched]
        assert known.count(True) > 1, "it gave up at the first refusal"
        assert known[-1] is False
