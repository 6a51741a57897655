"""The asyncio side of membership: watchers with bounded queues, and a sweep that sleeps until the next expiry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tandem_registry.backends import subscriptions
from tandem_registry.backends.memory import MemoryBackend
from tandem_registry.view import Change, RemovalReason, View

from tandem.errors import Draining, Overloaded, RevisionAhead
from tandem.testing.eventually import assert_eventually
from tests.unit.support.registry_workers import make_worker

TTL_S = 0.2


@pytest.fixture
async def backend() -> AsyncIterator[MemoryBackend]:
    backend = MemoryBackend(TTL_S, pending_steps_max=4)
    await backend.start("")
    yield backend
    await backend.close()


async def test_a_silent_worker_is_swept_without_any_call(backend: MemoryBackend) -> None:
    subscription = await backend.subscribe()
    await backend.register(make_worker())
    steps = subscription.steps()
    came = await anext(steps)
    assert isinstance(came, Change)
    assert came.upserted == (make_worker(),)
    async with asyncio.timeout(TTL_S + 0.5):
        gone = await anext(steps)
    assert isinstance(gone, Change)
    assert [removed.reason for removed in gone.removed] == [RemovalReason.LEASE_EXPIRED]


async def test_a_watcher_that_is_too_slow_is_ended_and_keeps_no_memory(backend: MemoryBackend) -> None:
    slow, quick = await backend.subscribe(), await backend.subscribe()
    quick_steps = quick.steps()
    for epoch in range(1, 7):
        await backend.register(make_worker(epoch=epoch))
        await anext(quick_steps)
        assert slow.pending_count <= 4
    assert slow.pending_count == 0
    assert backend.watcher_count == 1
    with pytest.raises(Overloaded):
        await anext(slow.steps())


async def test_a_watcher_at_its_bound_misses_nothing(backend: MemoryBackend) -> None:
    subscription = await backend.subscribe()
    for epoch in range(1, 5):
        await backend.register(make_worker(epoch=epoch))
    steps = subscription.steps()
    assert [(await anext(steps)).revision for _ in range(4)] == [1, 2, 3, 4]


async def test_watchers_are_counted_and_bounded(backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "WATCHERS_MAX", 1)
    first = await backend.subscribe()
    with pytest.raises(Overloaded):
        await backend.subscribe()
    first.close()
    first.close()
    (await backend.subscribe()).close()
    assert backend.watcher_count == 0


async def test_closing_ends_watchers_after_what_they_have_not_read(backend: MemoryBackend) -> None:
    subscription = await backend.subscribe()
    await backend.register(make_worker())
    await backend.close()
    seen: list[Change | View] = []
    with pytest.raises(Draining):  # noqa: PT012 -- the loop is what raises, at its end
        async for change in subscription.steps():
            seen.append(change)
    assert len(seen) == 1
    with pytest.raises(Draining):
        await backend.register(make_worker("other"))


async def test_the_death_of_the_sweep_is_reported(backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = asyncio.ensure_future(backend.wait_failed())

    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(backend._membership, "next_expiry_s", fail)
    await backend.register(make_worker())
    assert "broken" in await assert_eventually(lambda: waiting.result() if waiting.done() else "")


async def test_a_watcher_ahead_of_the_registry_gets_an_error(backend: MemoryBackend) -> None:
    grant = await backend.register(make_worker())
    (await backend.subscribe((backend.replica_id, grant.revision))).close()
    (await backend.subscribe(("another registry", grant.revision + 1))).close()
    with pytest.raises(RevisionAhead):
        await backend.subscribe((backend.replica_id, grant.revision + 1))
    assert backend.watcher_count == 0
