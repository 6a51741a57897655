"""Order of the request queue: fair between tenants, by priority and deadline within one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.admission.queue import QueuedRequest, RequestQueue


def order(*requests: QueuedRequest) -> list[int]:
    queue: RequestQueue[int] = RequestQueue()
    for number, request in enumerate(requests):
        queue.add(number, request)
    return [queue.take()[0] for _ in range(len(queue))]


def test_a_higher_priority_of_a_tenant_goes_first() -> None:
    requests = (QueuedRequest(tokens=1), QueuedRequest(tokens=1, priority=5), QueuedRequest(tokens=1, priority=-5))
    assert order(*requests) == [1, 0, 2]


def test_a_priority_of_one_tenant_does_not_delay_another() -> None:
    loud = [QueuedRequest(tokens=10, tenant="loud", priority=100)] * 50
    assert order(*loud, QueuedRequest(tokens=10, tenant="quiet")).index(50) <= 1


def test_a_tenant_with_one_request_at_a_time_gets_no_extra_share() -> None:
    """It leaves the queue with each request, which must not reset its virtual time."""
    queue: RequestQueue[int] = RequestQueue()
    for number in range(1000):
        queue.add(number, QueuedRequest(tokens=10, tenant="many"))
    queue.add(1000, QueuedRequest(tokens=10, tenant="one at a time"))
    given = {"many": 0, "one at a time": 0}
    for number in range(1001, 1401):
        _, request = queue.take()
        given[request.tenant] += request.tokens
        if request.tenant == "one at a time":
            queue.add(number, request)
    assert abs(given["many"] - given["one at a time"]) <= 20


def test_removed_tickets_are_dropped_from_the_heap() -> None:
    queue: RequestQueue[int] = RequestQueue()
    queue.add(-1, QueuedRequest(tokens=1, priority=1))
    for number in range(10_000):
        queue.add(number, QueuedRequest(tokens=1))
        queue.remove(number)
    assert len(queue) == 1
    assert sum(len(tenant.heap) for tenant in queue._tenants.values()) < 100


def test_orders_that_tenants_had_are_dropped_from_the_heap() -> None:
    queue: RequestQueue[int] = RequestQueue()
    queue.add(-1, QueuedRequest(tokens=1, tenant="first"))
    for number in range(10_000):
        queue.add(number, QueuedRequest(tokens=1, tenant=f"tenant-{number % 3}"))
        queue.remove(number)
    assert queue.first() == (-1, QueuedRequest(tokens=1, tenant="first"))
    assert len(queue._order) < 100


def test_within_a_tenant_the_earliest_deadline_goes_first() -> None:
    requests = (
        QueuedRequest(tokens=1),
        QueuedRequest(tokens=1, deadline_s=9),
        QueuedRequest(tokens=1, deadline_s=3),
        QueuedRequest(tokens=1, deadline_s=3),
    )
    assert order(*requests) == [2, 3, 1, 0]


def test_a_thousand_requests_of_one_tenant_do_not_delay_the_first_of_another() -> None:
    many = [QueuedRequest(tokens=10, tenant="many")] * 1000
    assert order(*many, QueuedRequest(tokens=10, tenant="one")).index(1000) <= 1


def test_shares_are_equal_in_tokens_not_in_requests() -> None:
    long = [QueuedRequest(tokens=300, tenant="long")] * 10
    short = [QueuedRequest(tokens=100, tenant="short")] * 30
    first = order(*long, *short)[:20]
    tokens = {"long": 0, "short": 0}
    for number in first:
        tokens["long" if number < 10 else "short"] += 300 if number < 10 else 100
    assert abs(tokens["long"] - tokens["short"]) <= 300


def test_a_late_tenant_has_no_credit_for_its_idle_time() -> None:
    queue: RequestQueue[int] = RequestQueue()
    for number in range(20):
        queue.add(number, QueuedRequest(tokens=10, tenant="early"))
    for _ in range(10):
        queue.take()
    for number in range(20, 40):
        queue.add(number, QueuedRequest(tokens=10, tenant="late"))
    next_six = [queue.take()[0] for _ in range(6)]
    assert sum(number >= 20 for number in next_six) in (3, 4), "equal shares from now on"


DEMANDS = st.builds(
    QueuedRequest,
    tokens=st.integers(1, 50),
    priority=st.integers(-1, 1),
    tenant=st.sampled_from(["a", "b", "c"]),
    deadline_s=st.one_of(st.none(), st.floats(0, 100)),
)


@given(st.lists(st.tuples(DEMANDS, st.sampled_from(["stay", "leave", "take"]))))
def test_no_request_is_lost_or_started_twice(steps: list[tuple[QueuedRequest, str]]) -> None:
    queue: RequestQueue[int] = RequestQueue()
    waiting: dict[int, QueuedRequest] = {}
    for number, (request, step) in enumerate(steps):
        queue.add(number, request)
        waiting[number] = request
        if step == "leave":
            queue.remove(number)
            queue.remove(number)
            del waiting[number]
        elif step == "take":
            first = queue.first()
            taken = queue.take()
            assert taken == first
            own = [d for d in waiting.values() if d.tenant == taken[1].tenant]
            assert taken[1].priority == max(d.priority for d in own)
            del waiting[taken[0]]
        if waiting:
            least = min(queue._tenants.values(), key=lambda tenant: tenant.order)
            assert queue.first() == (least.heap[0][2], waiting[least.heap[0][2]])
        assert len(queue) == len(waiting)
        assert queue.tokens == sum(d.tokens for d in waiting.values())
    assert sorted(queue.take()[0] for _ in range(len(queue))) == sorted(waiting)
    assert queue.first() is None


def test_tokens_before_counts_the_shares_of_other_tenants() -> None:
    queue: RequestQueue[str] = RequestQueue()
    for number in range(10):
        queue.add(f"a{number}", QueuedRequest(tokens=10, tenant="a"))
    assert queue.tokens_before(QueuedRequest(tokens=10, tenant="a")) == 100
    assert queue.tokens_before(QueuedRequest(tokens=10, tenant="b")) == 0, "an idle tenant goes next"
    for number in range(3):
        queue.add(f"b{number}", QueuedRequest(tokens=10, tenant="b"))
    assert queue.tokens_before(QueuedRequest(tokens=10, tenant="b")) == 30 + 30
    assert queue.tokens_before(QueuedRequest(tokens=10, tenant="a")) == 100 + 30, "no more than the other has queued"
    assert queue.tokens_before(QueuedRequest(tokens=10, tenant="b", priority=1)) == 0


def test_tenants_that_never_started_a_request_are_forgotten() -> None:
    queue: RequestQueue[int] = RequestQueue()
    queue.add(0, QueuedRequest(tokens=1, tenant="stays"))
    for number in range(1, 1_000):
        queue.add(number, QueuedRequest(tokens=1, tenant=f"tenant-{number}"))
        queue.remove(number)
    assert not queue._virtual_times


def test_queue_a_short_prompt_that_has_waited_overtakes_long_ones() -> None:
    now_s = 0.0
    queue: RequestQueue[str] = RequestQueue(lambda: now_s, short_wait_s=5.0)
    for number in range(4):
        queue.add(f"long{number}", QueuedRequest(tokens=2_000, prompt_tokens=2_000))
    queue.add("short", QueuedRequest(tokens=20, prompt_tokens=20))
    assert queue.take()[0] == "long0"
    now_s = 5.0
    assert [queue.take()[0] for _ in range(4)] == ["short", "long1", "long2", "long3"]


def test_queue_short_prompts_never_stop_a_long_one() -> None:
    now_s = 0.0
    queue: RequestQueue[str] = RequestQueue(lambda: now_s, short_wait_s=1.0)
    for number in range(2):
        queue.add(f"long{number}", QueuedRequest(tokens=100, prompt_tokens=100))
    for number in range(20):
        queue.add(f"short{number}", QueuedRequest(tokens=20, prompt_tokens=20))
    now_s = 1.0
    order = [queue.take()[0] for _ in range(22)]
    # Between two long prompts go short ones of as many tokens, and the one that exceeds them.
    assert order.index("long0") <= 1
    assert order.index("long1") - order.index("long0") == 7


def test_queue_a_short_prompt_overtakes_no_higher_priority() -> None:
    now_s = 0.0
    queue: RequestQueue[str] = RequestQueue(lambda: now_s, short_wait_s=1.0)
    queue.add("long", QueuedRequest(tokens=100, prompt_tokens=100, priority=1))
    queue.add("short", QueuedRequest(tokens=20, prompt_tokens=20))
    now_s = 9.0
    assert [queue.take()[0] for _ in range(2)] == ["long", "short"]


def test_queue_without_waiting_keeps_the_order_of_arrival() -> None:
    now_s = 0.0
    queue: RequestQueue[str] = RequestQueue(lambda: now_s, short_wait_s=1.0)
    queue.add("long", QueuedRequest(tokens=100, prompt_tokens=100))
    queue.add("short", QueuedRequest(tokens=20, prompt_tokens=20))
    queue.remove("long")
    queue.add("other", QueuedRequest(tokens=100, prompt_tokens=100))
    assert [queue.take()[0] for _ in range(2)] == ["short", "other"]
