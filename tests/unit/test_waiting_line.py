"""Who is next in the line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.admission.queue import QueuedRequest, RequestQueue


def order(*demands: QueuedRequest) -> list[int]:
    line: RequestQueue[int] = RequestQueue()
    for number, demand in enumerate(demands):
        line.add(number, demand)
    return [line.take()[0] for _ in range(len(line))]


def test_a_higher_priority_of_a_tenant_goes_first() -> None:
    demands = (QueuedRequest(tokens=1), QueuedRequest(tokens=1, priority=5), QueuedRequest(tokens=1, priority=-5))
    assert order(*demands) == [1, 0, 2]


def test_no_priority_of_one_tenant_holds_up_another() -> None:
    loud = [QueuedRequest(tokens=10, tenant="loud", priority=100)] * 50
    assert order(*loud, QueuedRequest(tokens=10, tenant="quiet")).index(50) <= 1


def test_who_comes_again_at_once_has_no_more_turns_than_who_waits() -> None:
    """A tenant with one request at a time leaves the line with each, and must not begin anew for it."""
    line: RequestQueue[int] = RequestQueue()
    for number in range(1000):
        line.add(number, QueuedRequest(tokens=10, tenant="many"))
    line.add(1000, QueuedRequest(tokens=10, tenant="one at a time"))
    given = {"many": 0, "one at a time": 0}
    for number in range(1001, 1401):
        _, demand = line.take()
        given[demand.tenant] += demand.tokens
        if demand.tenant == "one at a time":
            line.add(number, demand)
    assert abs(given["many"] - given["one at a time"]) <= 20


def test_tickets_that_left_are_not_kept() -> None:
    line: RequestQueue[int] = RequestQueue()
    line.add(-1, QueuedRequest(tokens=1, priority=1))
    for number in range(10_000):
        line.add(number, QueuedRequest(tokens=1))
        line.remove(number)
    assert len(line) == 1
    assert sum(len(tenant.heap) for tenant in line._tenants.values()) < 100


def test_within_a_tenant_the_earliest_deadline_goes_first() -> None:
    demands = (
        QueuedRequest(tokens=1),
        QueuedRequest(tokens=1, deadline_s=9),
        QueuedRequest(tokens=1, deadline_s=3),
        QueuedRequest(tokens=1, deadline_s=3),
    )
    assert order(*demands) == [2, 3, 1, 0]


def test_a_thousand_requests_of_one_tenant_do_not_hold_up_anothers_first() -> None:
    many = [QueuedRequest(tokens=10, tenant="many")] * 1000
    assert order(*many, QueuedRequest(tokens=10, tenant="one")).index(1000) <= 1


def test_tenants_take_turns_by_tokens_not_by_requests() -> None:
    long = [QueuedRequest(tokens=300, tenant="long")] * 10
    short = [QueuedRequest(tokens=100, tenant="short")] * 30
    first = order(*long, *short)[:20]
    tokens = {"long": 0, "short": 0}
    for number in first:
        tokens["long" if number < 10 else "short"] += 300 if number < 10 else 100
    assert abs(tokens["long"] - tokens["short"]) <= 300


def test_a_tenant_that_comes_late_has_no_credit_for_the_time_before() -> None:
    line: RequestQueue[int] = RequestQueue()
    for number in range(20):
        line.add(number, QueuedRequest(tokens=10, tenant="early"))
    for _ in range(10):
        line.take()
    for number in range(20, 40):
        line.add(number, QueuedRequest(tokens=10, tenant="late"))
    next_six = [line.take()[0] for _ in range(6)]
    assert sum(number >= 20 for number in next_six) in (3, 4), "they take turns from now on"


DEMANDS = st.builds(
    QueuedRequest,
    tokens=st.integers(1, 50),
    priority=st.integers(-1, 1),
    tenant=st.sampled_from(["a", "b", "c"]),
    deadline_s=st.one_of(st.none(), st.floats(0, 100)),
)


@given(st.lists(st.tuples(DEMANDS, st.sampled_from(["stay", "leave", "take"]))))
def test_nobody_is_lost_or_served_twice(steps: list[tuple[QueuedRequest, str]]) -> None:
    line: RequestQueue[int] = RequestQueue()
    waiting: dict[int, QueuedRequest] = {}
    for number, (demand, step) in enumerate(steps):
        line.add(number, demand)
        waiting[number] = demand
        if step == "leave":
            line.remove(number)
            line.remove(number)
            del waiting[number]
        elif step == "take":
            first = line.first()
            taken = line.take()
            assert taken == first
            own = [d for d in waiting.values() if d.tenant == taken[1].tenant]
            assert taken[1].priority == max(d.priority for d in own)
            del waiting[taken[0]]
        assert len(line) == len(waiting)
        assert line.tokens == sum(d.tokens for d in waiting.values())
    assert sorted(line.take()[0] for _ in range(len(line))) == sorted(waiting)
    assert line.first() is None


def test_what_goes_before_a_newcomer_counts_the_turns_of_others() -> None:
    line: RequestQueue[str] = RequestQueue()
    for number in range(10):
        line.add(f"a{number}", QueuedRequest(tokens=10, tenant="a"))
    assert line.tokens_before(QueuedRequest(tokens=10, tenant="a")) == 100
    assert line.tokens_before(QueuedRequest(tokens=10, tenant="b")) == 0, "his turn comes at once"
    for number in range(3):
        line.add(f"b{number}", QueuedRequest(tokens=10, tenant="b"))
    assert line.tokens_before(QueuedRequest(tokens=10, tenant="b")) == 30 + 30
    assert line.tokens_before(QueuedRequest(tokens=10, tenant="a")) == 100 + 30, "of another tenant no more than waits"
    assert line.tokens_before(QueuedRequest(tokens=10, tenant="b", priority=1)) == 0


def test_tenants_that_leave_without_a_turn_are_forgotten() -> None:
    line: RequestQueue[int] = RequestQueue()
    line.add(0, QueuedRequest(tokens=1, tenant="stays"))
    for number in range(1, 1_000):
        line.add(number, QueuedRequest(tokens=1, tenant=f"tenant-{number}"))
        line.remove(number)
    assert not line._turns
