"""A process pause that outlives the lease takes a new epoch; a registry outage does not."""

from __future__ import annotations

import asyncio

import pytest

from tandem.clock import ManualClock
from tandem.discovery import LeaseTime
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker, WorkerRole
from tandem.testing.eventually import assert_eventually
from tandem.worker.identity import Identity
from tests.unit.support.registry_workers import make_worker

TTL_S = 5.0


class FakeLease:
    """A registration whose lease time each test sets."""

    def __init__(self, clock: ManualClock) -> None:
        self.ttl_s = TTL_S
        self.lease_time: LeaseTime | None = LeaseTime(TTL_S, clock.now_s + TTL_S)
        self.renewed: list[int] = []
        self.replaced: list[Worker] = []
        self.adapters: tuple[Adapter, ...] = ()

    def renew(self, epoch: int) -> None:
        self.renewed.append(epoch)

    def replace(self, member: Worker) -> None:
        self.replaced.append(member)

    async def set_adapters(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        self.adapters = adapters
        return True


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def lease(clock: ManualClock) -> FakeLease:
    return FakeLease(clock)


@pytest.fixture
def identity(clock: ManualClock, lease: FakeLease) -> Identity:
    return Identity(make_worker(epoch=7), lease, clock=clock, new_epoch=lambda: 1000)


def test_a_pause_shorter_than_the_lease_keeps_the_epoch(
    identity: Identity, clock: ManualClock, lease: FakeLease
) -> None:
    clock.advance(TTL_S - 0.1)
    assert identity.current().epoch == 7
    assert not lease.renewed


def test_a_pause_in_which_the_lease_expires_takes_a_new_epoch(
    identity: Identity, clock: ManualClock, lease: FakeLease
) -> None:
    clock.advance(1.5)
    assert identity.current().epoch == 7
    # The lease has 3.5 s left.
    clock.advance(3.6)
    assert identity.current().epoch == 1000
    assert lease.renewed == [1000]
    assert identity.current().epoch == 1000
    assert lease.renewed == [1000], "registered once"


def test_a_pause_longer_than_the_ttl_takes_a_new_epoch_without_a_lease(
    identity: Identity, clock: ManualClock, lease: FakeLease
) -> None:
    lease.lease_time = None
    clock.advance(TTL_S + 0.1)
    assert identity.current().epoch == 1000


def test_a_registry_outage_keeps_the_epoch(identity: Identity, clock: ManualClock, lease: FakeLease) -> None:
    for _ in range(1000):
        clock.advance(0.2)
        assert identity.current().epoch == 7
    # A pause during the outage that is shorter than a lease does not change it either.
    clock.advance(TTL_S - 0.1)
    assert identity.current().epoch == 7
    assert not lease.renewed


def test_a_short_pause_at_the_end_of_a_lease_that_is_not_renewed_keeps_the_epoch(
    identity: Identity, clock: ManualClock, lease: FakeLease
) -> None:
    for _ in range(24):
        clock.advance(0.2)
        identity.current()
    clock.advance(TTL_S / 2 - 0.1)
    assert identity.current().epoch == 7


def test_the_epoch_grows_when_the_system_clock_moves_backwards(clock: ManualClock, lease: FakeLease) -> None:
    identity = Identity(make_worker(epoch=2000), lease, clock=clock, new_epoch=lambda: 1000)
    clock.advance(TTL_S + 1)
    assert identity.current().epoch == 2001


async def test_the_heartbeat_detects_a_pause_without_a_call(
    identity: Identity, clock: ManualClock, lease: FakeLease
) -> None:
    heartbeat = asyncio.create_task(identity.beat())
    await asyncio.sleep(0)
    clock.advance(TTL_S + 1)
    await assert_eventually(lambda: lease.renewed == [1000])
    heartbeat.cancel()


def test_a_previous_incarnation_with_a_higher_epoch_is_superseded(identity: Identity, lease: FakeLease) -> None:
    identity.supersede(5_000)
    assert identity.current().epoch == 5_001
    assert lease.renewed == [5_001]


def test_superseding_never_takes_an_epoch_below_the_clock(identity: Identity, lease: FakeLease) -> None:
    identity.supersede(8)
    assert identity.current().epoch == 1000
    assert lease.renewed == [1000]


def test_a_new_role_takes_an_epoch_above_the_present_one(identity: Identity, lease: FakeLease) -> None:
    described = make_worker(epoch=1, role=WorkerRole.DECODE)
    worker = identity.become(described, ())
    assert (worker.epoch, worker.role) == (1000, WorkerRole.DECODE)
    assert identity.become(described, ()).epoch == 1001, "the clock stands, and the epoch must not"
    assert identity.current() == lease.replaced[-1]
    assert not lease.renewed


async def test_a_new_role_keeps_the_adapters_that_are_still_loaded(identity: Identity, lease: FakeLease) -> None:
    kept, lost = Adapter("kept", "1" * 64), Adapter("lost", "2" * 64)
    await identity.serve((kept, lost), 0.0)
    assert identity.become(make_worker(), {kept}).adapters == (kept,)
    assert lease.replaced[-1].adapters == (kept,)
