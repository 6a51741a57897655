"""A watcher's view of the workers while registries stop and start."""

from __future__ import annotations

import pytest

from tandem.clock import ManualClock
from tandem.discovery.view import ViewGap, WorkerView
from tests.unit.support.registry_workers import make_worker

GRACE_S = 10.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(50.0)


@pytest.fixture
def view(clock: ManualClock) -> WorkerView:
    view = WorkerView(clock, GRACE_S)
    view.apply_snapshot("old", 7, [make_worker("a"), make_worker("b")])
    return view


def ids(view: WorkerView) -> list[str]:
    return [worker.worker_id for worker in view.members()]


def test_deltas_follow_a_snapshot(view: WorkerView) -> None:
    view.apply_delta("old", 7, 8, [make_worker("c")], [("a", 1)])
    assert ids(view) == ["b", "c"]


@pytest.mark.parametrize(
    ("registry_id", "previous", "revision"), [("old", 8, 9), ("old", 6, 8), ("new", 7, 8), ("old", 7, 7), ("old", 7, 6)]
)
def test_a_gap_changes_nothing(view: WorkerView, registry_id: str, previous: int, revision: int) -> None:
    with pytest.raises(ViewGap):
        view.apply_delta(registry_id, previous, revision, [], [("a", 1)])
    assert ids(view) == ["a", "b"]
    assert view.revision == 7


def test_revisions_may_grow_in_larger_steps(view: WorkerView) -> None:
    view.apply_delta("old", 7, 40, [make_worker("c")], [])
    view.apply_delta("old", 40, 41, [], [("a", 1)])
    assert ids(view) == ["b", "c"]
    assert view.revision == 41


def test_the_removal_of_an_older_start_leaves_the_newer_one(view: WorkerView) -> None:
    view.apply_delta("old", 7, 8, [make_worker("a", 2)], [("a", 1)])
    view.apply_delta("old", 8, 9, [], [("a", 1)])
    assert ids(view) == ["a", "b"]


def test_the_same_registrys_snapshot_is_the_truth(view: WorkerView) -> None:
    view.apply_snapshot("old", 12, [])
    assert ids(view) == []


def test_an_older_snapshot_of_the_same_registry_is_no_proof_of_absence(view: WorkerView, clock: ManualClock) -> None:
    view.apply_snapshot("old", 3, [make_worker("b")])
    assert ids(view) == ["a", "b"]
    assert [worker.worker_id for worker in view.unconfirmed()] == ["a"]
    clock.advance(4)
    view.apply_snapshot("old", 2, [make_worker("b")])
    assert view.next_drop_s() == 60.0, "a second one gives no new time"
    view.apply_delta("old", 2, 9, [make_worker("a")], [])
    assert not view.unconfirmed()


def test_an_older_snapshot_does_not_bring_a_former_start_back(view: WorkerView) -> None:
    view.apply_delta("old", 7, 8, [make_worker("a", 2)], [])
    view.apply_snapshot("old", 7, [make_worker("a"), make_worker("b")])
    assert {worker.worker_id: worker.epoch for worker in view.members()} == {"a": 2, "b": 1}
    assert [worker.worker_id for worker in view.unconfirmed()] == ["a"]


def test_an_empty_snapshot_of_another_registry_is_suspect_for_a_while(view: WorkerView, clock: ManualClock) -> None:
    view.apply_snapshot("new", 0, [])
    assert ids(view) == ["a", "b"]
    assert view.unconfirmed() == view.members()
    assert view.next_drop_s() == 60.0
    view.apply_delta("new", 0, 1, [make_worker("a")], [])
    assert [worker.worker_id for worker in view.unconfirmed()] == ["b"]
    clock.advance(GRACE_S - 0.001)
    assert not view.drop_overdue()
    clock.advance(0.001)
    assert view.drop_overdue()
    assert ids(view) == ["a"]
    assert view.next_drop_s() is None


def test_a_partial_snapshot_of_another_registry_is_as_suspect(view: WorkerView) -> None:
    view.apply_snapshot("new", 1, [make_worker("b")])
    assert ids(view) == ["a", "b"]
    assert [worker.worker_id for worker in view.unconfirmed()] == ["a"]


def test_a_reconnection_to_the_same_registry_gives_no_new_time(view: WorkerView, clock: ManualClock) -> None:
    view.apply_snapshot("new", 0, [])
    clock.advance(4)
    view.apply_snapshot("new", 0, [])
    assert ids(view) == ["a", "b"]
    assert view.next_drop_s() == 60.0


def test_a_third_registry_gives_new_time(view: WorkerView, clock: ManualClock) -> None:
    view.apply_snapshot("new", 0, [])
    clock.advance(4)
    view.apply_snapshot("newer", 0, [])
    assert view.next_drop_s() == 64.0


def test_an_unconfirmed_worker_goes_when_its_address_is_taken_or_its_leaving_is_reported(view: WorkerView) -> None:
    view.apply_snapshot("new", 0, [])
    view.apply_delta("new", 0, 1, [make_worker("c", 9, "a:1")], [])
    assert ids(view) == ["b", "c"]
    view.apply_delta("new", 1, 2, [], [("b", 1)])
    assert ids(view) == ["c"]
