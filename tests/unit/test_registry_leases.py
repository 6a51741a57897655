"""Membership rule by rule, on a clock that does not run."""

from __future__ import annotations

import itertools

import pytest
from tandem_registry.leases import Membership
from tandem_registry.view import Change, RemovalReason

from tandem.clock import ManualClock
from tandem.domain.worker import WorkerState
from tandem.errors import DuplicateWorker, StaleEpoch, WorkerNotFound
from tests.unit.support.registry_workers import make_frontend, make_worker

TTL_S = 5.0


class Scene:
    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.changes: list[Change] = []
        lease_ids = itertools.count(1)
        self.membership = Membership(
            owner="r",
            ttl_s=TTL_S,
            clock=self.clock,
            new_lease_id=lambda: f"lease-{next(lease_ids)}",
            on_change=self.changes.append,
        )

    def ids(self) -> list[str]:
        return [entry.member.worker_id for entry in self.membership.view().workers]

    def removed(self) -> list[tuple[str, int, RemovalReason]]:
        gone = [removed for change in self.changes for removed in change.removed]
        return [(removed.member.member_id, removed.member.epoch, removed.reason) for removed in gone]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_registered_worker_is_in_the_view_at_the_granted_revision(scene: Scene) -> None:
    grant = scene.membership.register(make_worker("b"))
    assert grant.revision == 1
    assert scene.membership.register(make_worker("a")).revision == 2
    assert scene.ids() == ["a", "b"]
    assert [change.revision for change in scene.changes] == [1, 2]


def test_a_lease_ends_exactly_at_its_time(scene: Scene) -> None:
    scene.membership.register(make_worker())
    assert scene.membership.next_expiry_s() == 105.0
    scene.clock.now_s = 104.999
    assert scene.ids() == ["decode-0"]
    scene.clock.now_s = 105.0
    assert scene.ids() == []
    assert scene.removed() == [("decode-0", 1, RemovalReason.LEASE_EXPIRED)]
    assert scene.membership.next_expiry_s() is None


def test_a_sign_of_life_gives_the_whole_time_anew(scene: Scene) -> None:
    lease_id = scene.membership.register(make_worker()).lease_id
    scene.clock.advance(4)
    scene.membership.keep_alive(lease_id)
    assert scene.membership.next_expiry_s() == 109.0
    assert scene.membership.view().workers[0].lease_age_s == 0
    assert len(scene.changes) == 1, "a sign of life is no change of the view"


def test_a_lease_that_is_over_cannot_be_kept_alive(scene: Scene) -> None:
    lease_id = scene.membership.register(make_worker()).lease_id
    scene.clock.advance(TTL_S)
    with pytest.raises(WorkerNotFound):
        scene.membership.keep_alive(lease_id)


def test_all_that_end_together_leave_in_one_change(scene: Scene) -> None:
    scene.membership.register(make_worker("a"))
    scene.membership.register(make_worker("b"))
    scene.clock.advance(TTL_S)
    scene.membership.expire()
    assert [len(change.removed) for change in scene.changes] == [0, 0, 2]


def test_a_newer_start_at_the_same_address_replaces_the_older_one(scene: Scene) -> None:
    old = scene.membership.register(make_worker(epoch=1, address="h:1"))
    scene.membership.register(make_worker(epoch=2, address="h:1"))
    assert scene.removed() == [("decode-0", 1, RemovalReason.REPLACED)]
    assert len(scene.changes) == 2, "coming and going are one change"
    with pytest.raises(WorkerNotFound):
        scene.membership.keep_alive(old.lease_id)


def test_a_newer_start_elsewhere_waits_until_the_holder_has_missed_a_sign_of_life(scene: Scene) -> None:
    holder = scene.membership.register(make_worker(epoch=1, address="h:1")).lease_id
    for _ in range(5):
        scene.clock.advance(TTL_S / 3)
        with pytest.raises(DuplicateWorker) as refusal:
            scene.membership.register(make_worker(epoch=2, address="h:2"))
        scene.membership.keep_alive(holder)
    assert refusal.value.metadata == {
        "worker": "decode-0", "epoch": "1", "address": "h:1", "field": "worker_id", "lease_ttl_ms": "5000"
    }  # fmt: skip
    assert len(scene.changes) == 1, "the holder did not notice"
    scene.clock.advance(TTL_S / 2 + 0.01)
    scene.membership.register(make_worker(epoch=2, address="h:2"))
    assert scene.removed() == [("decode-0", 1, RemovalReason.REPLACED)]


@pytest.mark.parametrize("epoch", [4, 5])
def test_a_start_that_is_not_newer_is_refused_while_the_holder_lives(scene: Scene, epoch: int) -> None:
    scene.membership.register(make_worker(epoch=5))
    with pytest.raises(DuplicateWorker) as refusal:
        scene.membership.register(make_worker(epoch=epoch, address="h:9"))
    assert (refusal.value.metadata["epoch"], refusal.value.metadata["field"]) == ("5", "worker_id")
    scene.clock.advance(TTL_S)
    scene.membership.register(make_worker(epoch=epoch))


def test_another_worker_at_the_address_replaces_when_newer_and_is_refused_when_not(scene: Scene) -> None:
    scene.membership.register(make_worker("a", 5, "h:1"))
    with pytest.raises(DuplicateWorker) as refusal:
        scene.membership.register(make_worker("b", 4, "h:1"))
    assert (refusal.value.metadata["worker"], refusal.value.metadata["field"]) == ("a", "address")
    scene.membership.register(make_worker("b", 6, "h:1"))
    assert scene.ids() == ["b"]
    assert scene.removed() == [("a", 5, RemovalReason.REPLACED)]


def test_a_refused_start_changes_nothing(scene: Scene) -> None:
    scene.membership.register(make_worker("a", 1, "h:1"))
    scene.membership.register(make_worker("b", 9, "h:2"))
    with pytest.raises(DuplicateWorker):
        scene.membership.register(make_worker("a", 5, "h:2"))
    assert scene.ids() == ["a", "b"]
    assert len(scene.changes) == 2


def test_one_start_can_take_the_places_of_two(scene: Scene) -> None:
    scene.membership.register(make_worker("a", 1, "h:1"))
    scene.membership.register(make_worker("b", 1, "h:2"))
    scene.clock.advance(TTL_S * 0.9)
    scene.membership.register(make_worker("a", 2, "h:2"))
    assert scene.ids() == ["a"]
    assert sorted(scene.removed()) == [("a", 1, RemovalReason.REPLACED), ("b", 1, RemovalReason.REPLACED)]


def test_drain_marks_once_and_keeps_the_lease(scene: Scene) -> None:
    lease_id = scene.membership.register(make_worker(epoch=3)).lease_id
    assert scene.membership.drain("decode-0", 3) == 2
    scene.membership.register(make_worker("other"))
    assert scene.membership.drain("decode-0", 3) == 2, "the revision that first showed it"
    assert scene.membership.view().workers[0].member.state is WorkerState.DRAINING
    scene.membership.keep_alive(lease_id)
    assert scene.membership.view().workers[0].member.state is WorkerState.DRAINING


def test_drain_names_an_unknown_worker_and_another_start(scene: Scene) -> None:
    with pytest.raises(WorkerNotFound) as unknown:
        scene.membership.drain("ghost", 1)
    assert unknown.value.metadata == {"worker": "ghost"}
    scene.membership.register(make_worker(epoch=3))
    with pytest.raises(StaleEpoch) as stale:
        scene.membership.drain("decode-0", 2)
    assert stale.value.metadata == {"worker": "decode-0", "expected": "2", "actual": "3"}


def test_a_state_in_a_sign_of_life_is_a_change(scene: Scene) -> None:
    lease_id = scene.membership.register(make_worker()).lease_id
    scene.membership.keep_alive(lease_id, WorkerState.DRAINING)
    scene.membership.keep_alive(lease_id, WorkerState.DRAINING)
    assert [change.revision for change in scene.changes] == [1, 2]


def test_deregister_takes_the_worker_out_at_once(scene: Scene) -> None:
    lease_id = scene.membership.register(make_worker()).lease_id
    assert scene.membership.deregister(lease_id) == 2
    assert scene.removed() == [("decode-0", 1, RemovalReason.DEREGISTERED)]
    with pytest.raises(WorkerNotFound):
        scene.membership.deregister(lease_id)


def test_after_a_pause_of_the_registry_each_lease_lasts_for_one_more_renewal(scene: Scene) -> None:
    alive = scene.membership.register(make_worker("alive")).lease_id
    scene.membership.register(make_worker("dead"))
    scene.clock.advance(60)
    assert scene.ids() == ["alive", "dead"], "a registry that slept cannot know who died"
    scene.membership.keep_alive(alive)
    scene.clock.advance(TTL_S / 2)
    assert scene.ids() == ["alive"]


def test_pauses_extend_a_lease_only_once(scene: Scene) -> None:
    scene.membership.register(make_worker())
    scene.clock.advance(60)
    assert scene.ids() == ["decode-0"]
    scene.clock.advance(60)
    assert scene.ids() == []


def test_a_frontend_holds_a_lease_like_a_worker(scene: Scene) -> None:
    grant = scene.membership.register(make_frontend())
    scene.membership.register(make_worker())
    scene.clock.advance(3)
    scene.membership.keep_alive(grant.lease_id, WorkerState.DRAINING)
    (entry,) = scene.membership.view().frontends
    assert (entry.member.state, entry.lease_age_s, entry.owner) == (WorkerState.DRAINING, 0, "r")
    scene.clock.advance(2)
    assert scene.ids() == [], "each lease has its own time"
    assert len(scene.membership.view().frontends) == 1
    scene.membership.deregister(grant.lease_id)
    assert scene.membership.view().frontends == ()
    assert [change.revision for change in scene.changes] == [1, 2, 3, 4, 5], "one count for all members"


def test_a_frontend_and_a_worker_may_share_an_id_but_not_an_address(scene: Scene) -> None:
    scene.membership.register(make_worker("one", epoch=5))
    scene.membership.register(make_frontend("one", epoch=5))
    with pytest.raises(DuplicateWorker) as refusal:
        scene.membership.register(make_frontend("two", epoch=4, address="one:1"))
    assert refusal.value.metadata["field"] == "address"
    with pytest.raises(DuplicateWorker) as refusal:
        scene.membership.register(make_frontend("one", epoch=5, address="elsewhere:1"))
    assert refusal.value.metadata["field"] == "frontend_id"
    with pytest.raises(WorkerNotFound):
        scene.membership.drain("two", 5)
