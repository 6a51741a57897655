"""A watcher's view of the frontends, and which of them it keeps although a list lacks them."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.discovery.view import FrontendView
from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState

GRACE_S = 10.0


@dataclass
class Hand:
    """A clock that the test moves."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def frontend(frontend_id: str, epoch: int = 1, address: str | None = None, is_draining: bool = False) -> Frontend:
    state = WorkerState.DRAINING if is_draining else WorkerState.SERVING
    return Frontend(
        frontend_id=frontend_id, epoch=epoch, address=address or f"{frontend_id}:1", model="tiny", state=state
    )


def ids(view: FrontendView) -> list[str]:
    return [entry.frontend_id for entry in view.members()]


def view_of(*frontend_ids: str) -> tuple[FrontendView, Hand]:
    clock = Hand()
    view = FrontendView(clock, GRACE_S)
    assert view.apply("r1", 5, [frontend(frontend_id) for frontend_id in frontend_ids])
    return view, clock


def test_the_next_list_of_the_same_registry_is_believed_at_once() -> None:
    view, _ = view_of("a", "b")
    assert view.apply("r1", 6, [frontend("b", is_draining=True), frontend("c")])
    assert view.members() == (frontend("b", is_draining=True), frontend("c"))
    assert view.next_drop_s() is None


def test_the_last_frontend_is_never_given_up() -> None:
    view, clock = view_of("a")
    assert not view.apply("r1", 6, [])
    assert not view.apply("r2", 1, [])
    clock.now_s = 100 * GRACE_S
    assert not view.drop_overdue()
    assert ids(view) == ["a"]


def test_an_empty_list_before_a_full_one_is_a_list() -> None:
    view = FrontendView(Hand())
    assert view.apply("r1", 1, [])
    assert view.members() == ()


def test_another_registry_proves_an_absence_only_after_a_while() -> None:
    view, clock = view_of("a", "b", "c")
    assert view.apply("r2", 1, [frontend("b")])
    assert ids(view) == ["a", "b", "c"]
    clock.now_s = GRACE_S / 2
    assert view.apply("r2", 2, [frontend("a", epoch=2), frontend("b")])
    assert not view.drop_overdue()
    assert view.next_drop_s() == GRACE_S
    clock.now_s = GRACE_S
    assert view.drop_overdue()
    assert ids(view) == ["a", "b"]
    assert view.next_drop_s() is None


def test_an_older_list_proves_no_absence_and_brings_no_former_start_back() -> None:
    view, _ = view_of("a", "b")
    assert view.apply("r1", 6, [frontend("a", epoch=2), frontend("b")])
    assert view.apply("r1", 5, [frontend("a", epoch=1)])
    assert view.members() == (frontend("a", epoch=2), frontend("b"))


def test_a_second_change_of_registry_does_not_prolong_the_time() -> None:
    view, clock = view_of("a", "b")
    view.apply("r2", 1, [frontend("b")])
    clock.now_s = GRACE_S / 2
    view.apply("r3", 1, [frontend("b")])
    assert view.next_drop_s() == GRACE_S


def test_an_unconfirmed_frontend_is_replaced_by_the_new_one_at_its_address() -> None:
    view, _ = view_of("a", "b")
    view.apply("r2", 1, [frontend("c", address="a:1")])
    assert ids(view) == ["b", "c"]
