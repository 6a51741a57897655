"""When a process that did not run for a while is no longer the worker it was."""

from __future__ import annotations

import asyncio

import pytest

from tandem.clock import ManualClock
from tandem.discovery import LeaseTime
from tandem.testing.eventually import assert_eventually
from tandem.worker.identity import Identity
from tests.unit.support.registry_workers import make_worker

TTL_S = 5.0


class Place:
    """A lease as the registry keeps it."""

    def __init__(self, clock: ManualClock) -> None:
        self.ttl_s = TTL_S
        self.lease_time: LeaseTime | None = LeaseTime(TTL_S, clock.now_s + TTL_S)
        self.renewed: list[int] = []

    def renew(self, epoch: int) -> None:
        self.renewed.append(epoch)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def place(clock: ManualClock) -> Place:
    return Place(clock)


@pytest.fixture
def identity(clock: ManualClock, place: Place) -> Identity:
    return Identity(make_worker(epoch=7), place, clock=clock, new_epoch=lambda: 1000)


def test_a_pause_that_the_lease_outlived_changes_nothing(identity: Identity, clock: ManualClock, place: Place) -> None:
    clock.advance(TTL_S - 0.1)
    assert identity.current().epoch == 7
    assert not place.renewed


def test_a_pause_in_which_the_lease_ended_makes_a_new_start(
    identity: Identity, clock: ManualClock, place: Place
) -> None:
    clock.advance(1.5)
    assert identity.current().epoch == 7
    # The lease has 3.5 s left.
    clock.advance(3.6)
    assert identity.current().epoch == 1000
    assert place.renewed == [1000]
    assert identity.current().epoch == 1000
    assert place.renewed == [1000], "told once"


def test_a_pause_longer_than_any_lease_makes_a_new_start_even_without_one(
    identity: Identity, clock: ManualClock, place: Place
) -> None:
    place.lease_time = None
    clock.advance(TTL_S + 0.1)
    assert identity.current().epoch == 1000


def test_an_outage_of_the_registry_is_no_pause(identity: Identity, clock: ManualClock, place: Place) -> None:
    for _ in range(1000):
        clock.advance(0.2)
        assert identity.current().epoch == 7
    # Nor is a stall of the process during it that is shorter than a lease.
    clock.advance(TTL_S - 0.1)
    assert identity.current().epoch == 7
    assert not place.renewed


def test_a_short_stall_at_the_end_of_a_lease_that_is_not_kept_is_no_pause(
    identity: Identity, clock: ManualClock, place: Place
) -> None:
    for _ in range(24):
        clock.advance(0.2)
        identity.current()
    clock.advance(TTL_S / 2 - 0.1)
    assert identity.current().epoch == 7


def test_the_epoch_grows_even_when_the_clock_of_the_machine_went_back(clock: ManualClock, place: Place) -> None:
    identity = Identity(make_worker(epoch=2000), place, clock=clock, new_epoch=lambda: 1000)
    clock.advance(TTL_S + 1)
    assert identity.current().epoch == 2001


async def test_the_heartbeat_notices_without_a_leg(identity: Identity, clock: ManualClock, place: Place) -> None:
    heart = asyncio.create_task(identity.beat())
    await asyncio.sleep(0)
    clock.advance(TTL_S + 1)
    await assert_eventually(lambda: place.renewed == [1000])
    heart.cancel()


def test_a_start_of_before_with_a_later_epoch_is_outrun(identity: Identity, place: Place) -> None:
    identity.supersede(5_000)
    assert identity.current().epoch == 5_001
    assert place.renewed == [5_001]


def test_outrunning_takes_no_epoch_that_is_earlier_than_the_clock(identity: Identity, place: Place) -> None:
    identity.supersede(8)
    assert identity.current().epoch == 1000
    assert place.renewed == [1000]
