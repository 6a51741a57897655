"""A place in the registry: how it is kept, lost and taken again, by one member and by a whole fleet at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tandem.clock import ManualClock
from tandem.discovery import Registration
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState
from tandem.errors import DuplicateWorker, ServiceError, TandemError, WorkerNotFound
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import make_worker, port_of
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

FLEET = 60
FRONTEND = Frontend(frontend_id="frontend-0", epoch=1, address="frontend-0:1", model="tiny")


@asynccontextmanager
async def registered(registries: Sequence[ScriptedRegistry], *members: Any, **options: Any) -> AsyncIterator[Any]:
    addresses = [registry.address for registry in registries]
    places = [Registration(addresses, m, rng=random.Random(n), **options) for n, m in enumerate(members)]
    try:
        for place in places:
            await place.start()
        async with asyncio.timeout(10):
            await asyncio.gather(*(place.wait_registered() for place in places))
        yield places[0] if len(places) == 1 else places
    finally:
        await asyncio.gather(*(place.close() for place in places))


def arrivals(registry: ScriptedRegistry) -> list[float]:
    return sorted(time_s for time_s, *_ in registry.registered)


@pytest.mark.parametrize("problem", [WorkerNotFound("over"), ServiceError("gone")], ids=lambda p: type(p).__name__)
async def test_what_follows_a_loss_is_drawn_evenly_from_a_second(problem: TandemError) -> None:
    waits: list[float] = []
    for number in range(1000):
        place = Registration(["127.0.0.1:1"], make_worker(), rng=random.Random(number))
        place._was_answered = True
        waits.append(place._after(problem) or 0.0)
    tenths = [sum(tenth / 10 <= wait_s < (tenth + 1) / 10 for wait_s in waits) for tenth in range(10)]
    assert sum(tenths) == 1000
    assert all(60 < count < 140 for count in tenths), tenths


async def test_a_fleet_whose_leases_are_lost_does_not_register_in_one_moment() -> None:
    registry = ScriptedRegistry()
    fleet = [make_worker(f"w{number}") for number in range(FLEET)]
    async with play_registry(registry), registered([registry], *fleet) as places:
        registry.leases.clear()
        registry.registered.clear()
        # All of them have something to say at the same moment, and hear that their leases are over.
        await asyncio.gather(*(place.set_state(WorkerState.DRAINING, timeout_s=0) for place in places))
        await assert_eventually(lambda: len(registry.registered) == FLEET, within_s=10)
        times = arrivals(registry)
        # Drawn from one second; without the draw they come within a tenth.
        assert times[-1] - times[0] > 0.5


async def test_a_fleet_whose_registry_was_started_again_does_not_come_back_in_one_moment() -> None:
    former, new = ScriptedRegistry(), ScriptedRegistry()
    fleet = [make_worker(f"w{number}") for number in range(FLEET)]
    async with play_registry(former), registered([former], *fleet) as places:
        port = port_of(former.address)
        await former.stop()
        async with play_registry(new, port):
            await assert_eventually(lambda: len(new.registered) == FLEET, within_s=30)
            times = arrivals(new)
            assert times[-1] - times[0] > 0.5
            await assert_eventually(lambda: all(place.registered for place in places))


async def test_a_new_epoch_is_registered_at_once_and_the_old_lease_forgotten() -> None:
    registry = ScriptedRegistry(ttl_s=30)
    async with play_registry(registry), registered([registry], make_worker(epoch=3)) as place:
        place.renew(8)
        assert not place.registered
        await asyncio.wait_for(place.wait_registered(), 2)
        assert [epoch for *_, epoch in registry.registered] == [3, 8]
        assert place.registered


async def test_a_lease_that_is_granted_to_a_former_epoch_is_not_kept() -> None:
    """It was asked for before a pause, and granted after it."""
    registry = ScriptedRegistry(ttl_s=30)
    async with play_registry(registry):
        registry.may_answer.clear()
        place = Registration([registry.address], make_worker(epoch=3))
        try:
            await place.start()
            await assert_eventually(lambda: len(registry.registered) == 1)
            place.renew(8)
            registry.may_answer.set()
            await asyncio.wait_for(place.wait_registered(), 5)
            assert [epoch for *_, epoch in registry.registered] == [3, 8]
        finally:
            await place.close()
        assert registry.leases == {"decode-0.3.1"}, "the one of epoch 8 was given back"


async def test_a_lease_ends_a_leases_time_after_it_was_asked_for() -> None:
    """Not after the answer: the registry's clock ran meanwhile."""
    registry, clock = ScriptedRegistry(ttl_s=30), ManualClock()
    async with play_registry(registry):
        registry.may_answer.clear()
        place = Registration([registry.address], make_worker(), clock=clock)
        try:
            await place.start()
            await assert_eventually(lambda: len(registry.registered) == 1)
            clock.advance(2)
            registry.may_answer.set()
            await asyncio.wait_for(place.wait_registered(), 5)
            assert place.lease_time is not None
            assert place.lease_time.end_s == 30
        finally:
            await place.close()


async def test_a_member_that_was_replaced_while_it_slept_ends_though_its_new_epoch_is_later() -> None:
    registry = ScriptedRegistry()

    def held(member_id: str, epoch: int) -> TandemError | None:
        return DuplicateWorker("held", worker=member_id, epoch=5, address="elsewhere:1") if epoch > 3 else None

    async with play_registry(registry), registered([registry], make_worker(epoch=3)) as place:
        registry.register_error = held
        place.renew(8)
        assert "replaced by a newer start" in await asyncio.wait_for(place.wait_fenced(), 2)


async def test_a_grant_that_was_lost_on_the_way_is_not_taken_for_a_replacement() -> None:
    registry = ScriptedRegistry()
    worker = make_worker(epoch=3)

    def held_by_itself(member_id: str, epoch: int) -> TandemError | None:
        is_first = sum(known == 8 for *_, known in registry.registered) == 1
        held = DuplicateWorker("held", worker=member_id, epoch=8, address=worker.address)
        return held if epoch == 8 and is_first else None

    async with play_registry(registry), registered([registry], worker) as place:
        registry.register_error = held_by_itself
        place.renew(8)
        await asyncio.wait_for(place.wait_registered(), 5)
        assert place.fenced is None


def held_at(address: str, epoch: int) -> Any:
    """A registry that has a start of that epoch there."""

    def held(member_id: str, asked_epoch: int) -> TandemError | None:
        problem = DuplicateWorker("held", worker=member_id, epoch=epoch, address=address)
        return problem if asked_epoch <= epoch else None

    return held


@pytest.mark.parametrize("member", [make_worker(epoch=3), FRONTEND], ids=["worker", "frontend"])
async def test_a_start_whose_clock_went_back_supersedes_the_previous_one_at_once(member: Any) -> None:
    registry = ScriptedRegistry(ttl_s=30)
    registry.register_error = held_at(member.address, 8)
    async with play_registry(registry), registered([registry], member) as place:
        assert [epoch for *_, epoch in registry.registered] == [member.epoch, 9]
        assert place.registered


async def test_a_member_whose_address_was_taken_does_not_supersede_the_new_one() -> None:
    registry, worker = ScriptedRegistry(ttl_s=0.3), make_worker(epoch=3)
    async with play_registry(registry), registered([registry], worker) as place:
        registry.register_error = held_at(worker.address, 8)
        registry.leases.clear()
        assert "another live process" in await asyncio.wait_for(place.wait_fenced(), 12)
        assert {epoch for *_, epoch in registry.registered} == {3}


async def test_a_start_whose_clock_went_back_waits_for_the_lease_of_one_elsewhere() -> None:
    registry = ScriptedRegistry(ttl_s=30)
    registry.register_error = held_at("elsewhere:1", 8)
    async with play_registry(registry):
        place = Registration([registry.address], make_worker(epoch=3))
        try:
            await place.start()
            await assert_eventually(lambda: len(registry.registered) >= 2)
            assert place.fenced is None, "it had no place to lose"
            registry.register_error = lambda member_id, epoch: None
            await asyncio.wait_for(place.wait_registered(), 5)
            assert registry.registered[-1][-1] == 3
        finally:
            await place.close()


async def test_another_registry_is_called_when_one_is_gone() -> None:
    first, second = ScriptedRegistry(), ScriptedRegistry()
    async with play_registry(first), play_registry(second), registered([first, second], make_worker()) as place:
        assert not second.registered
        await first.stop()
        await assert_eventually(lambda: second.registered, within_s=10)
        await assert_eventually(lambda: place.registered)


async def test_a_frontend_whose_place_is_taken_goes_on_trying() -> None:
    registry = ScriptedRegistry(ttl_s=0.3)
    async with play_registry(registry), registered([registry], FRONTEND, may_be_fenced=False) as place:
        registry.register_error = lambda member_id, epoch: DuplicateWorker("held", epoch=99, address="elsewhere:1")
        registry.leases.clear()
        await assert_eventually(lambda: len(registry.registered) >= 3, within_s=10)
        assert place.fenced is None
        registry.register_error = lambda member_id, epoch: None
        await asyncio.wait_for(place.wait_registered(), 5)


@pytest.mark.parametrize("member", [make_worker(), FRONTEND], ids=["worker", "frontend"])
async def test_leaving_gives_the_lease_back(member: Any) -> None:
    registry = ScriptedRegistry()
    async with play_registry(registry):
        async with registered([registry], member):
            assert len(registry.leases) == 1
        assert not registry.leases


async def test_adapters_are_reported_until_a_registry_that_knows_them_has_them() -> None:
    one, two = Adapter("a", "1" * 64), Adapter("b", "2" * 64)
    registry = ScriptedRegistry()
    async with play_registry(registry), registered([registry], make_worker("w")) as place:
        assert await place.set_adapters((one,), 5)
        assert await place.set_adapters((one, two), 5)
        assert await place.set_adapters((), 5)
        assert registry.adapters == [["a"], ["a", "b"], []]
        registry.knows_adapters = False
        assert not await place.set_adapters((two,), 0.3)
        assert await place.set_adapters((), 5), "what it has is what is wanted again"
        assert len(registry.registered) == 1, "no new registration, and no new epoch"
