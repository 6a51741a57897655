"""Who is next in the line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.waiting_line import Demand, WaitingLine


def order(*demands: Demand) -> list[int]:
    line: WaitingLine[int] = WaitingLine()
    for number, demand in enumerate(demands):
        line.add(number, demand)
    return [line.take()[0] for _ in range(len(line))]


def test_a_higher_priority_goes_first() -> None:
    assert order(Demand(tokens=1), Demand(tokens=1, priority=5), Demand(tokens=1, priority=-5)) == [1, 0, 2]


def test_within_a_tenant_the_earliest_deadline_goes_first() -> None:
    demands = (
        Demand(tokens=1),
        Demand(tokens=1, deadline_s=9),
        Demand(tokens=1, deadline_s=3),
        Demand(tokens=1, deadline_s=3),
    )
    assert order(*demands) == [2, 3, 1, 0]


def test_a_thousand_requests_of_one_tenant_do_not_hold_up_anothers_first() -> None:
    many = [Demand(tokens=10, tenant="many")] * 1000
    assert order(*many, Demand(tokens=10, tenant="one")).index(1000) <= 1


def test_tenants_take_turns_by_tokens_not_by_requests() -> None:
    long = [Demand(tokens=300, tenant="long")] * 10
    short = [Demand(tokens=100, tenant="short")] * 30
    first = order(*long, *short)[:20]
    tokens = {"long": 0, "short": 0}
    for number in first:
        tokens["long" if number < 10 else "short"] += 300 if number < 10 else 100
    assert abs(tokens["long"] - tokens["short"]) <= 300


def test_a_tenant_that_comes_late_has_no_credit_for_the_time_before() -> None:
    line: WaitingLine[int] = WaitingLine()
    for number in range(20):
        line.add(number, Demand(tokens=10, tenant="early"))
    for _ in range(10):
        line.take()
    for number in range(20, 40):
        line.add(number, Demand(tokens=10, tenant="late"))
    next_six = [line.take()[0] for _ in range(6)]
    assert sum(number >= 20 for number in next_six) in (3, 4), "they take turns from now on"


DEMANDS = st.builds(
    Demand,
    tokens=st.integers(1, 50),
    priority=st.integers(-1, 1),
    tenant=st.sampled_from(["a", "b", "c"]),
    deadline_s=st.one_of(st.none(), st.floats(0, 100)),
)


@given(st.lists(st.tuples(DEMANDS, st.sampled_from(["stay", "leave", "take"]))))
def test_nobody_is_lost_or_served_twice(steps: list[tuple[Demand, str]]) -> None:
    line: WaitingLine[int] = WaitingLine()
    waiting: dict[int, Demand] = {}
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
            assert taken[1].priority == max(d.priority for d in waiting.values())
            del waiting[taken[0]]
        assert len(line) == len(waiting)
        assert line.tokens == sum(d.tokens for d in waiting.values())
    assert sorted(line.take()[0] for _ in range(len(line))) == sorted(waiting)
    assert line.first() is None
