"""Routing policies: what each of them picks, by what it knows of the workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.admission.prefill_backlog import RATE_KEPT_S
from tandem_frontend.routing.policy import PolicyName
from tandem_frontend.routing.session import LOAD_BOUND

from tandem.api.types.v1 import leg_pb2
from tandem.domain.worker import EngineLoad, UnfinishedPrompts, Worker
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import aggregated, decode, prefill
from tests.unit.support.routing_loads import Loaded

LARGE: dict[str, Any] = {"context_tokens_max": 2**20, "kv_capacity_tokens": 2**20}
POLICIES = [name for name in PolicyName if name is not PolicyName.RANDOM]


def fleet(prefills: int = 2, decodes: int = 1) -> tuple[Worker, ...]:
    return (
        *(prefill(f"prefill-{number}", **LARGE) for number in range(prefills)),
        *(decode(f"decode-{number}", **LARGE) for number in range(decodes)),
    )


def loaded(policy: PolicyName, prefills: int = 2, decodes: int = 1) -> Loaded:
    made = Loaded(policy, *fleet(prefills, decodes))
    made.report_all()
    return made


def compute(made: Loaded, worker: Worker, seconds: float, begin_s: float = 1_000.0, tokens: int = 936) -> None:
    """One prompt of a thousand tokens with its own cost, computed by a worker."""
    work = made.backlog.reserve(tokens)
    work.sent(worker.start)
    finish = leg_pb2.LegFinish()
    finish.timings.prefill_start_time.CopyFrom(Timestamp(seconds=int(begin_s)))
    end_s = begin_s + seconds
    finish.timings.prefill_end_time.CopyFrom(Timestamp(seconds=int(end_s), nanos=int(end_s % 1 * 1e9)))
    work.computed(finish)


@pytest.mark.parametrize("policy", [PolicyName.AUTO, PolicyName.LEAST_WORK, PolicyName.PREFIX, PolicyName.POWER_OF_TWO])
def test_the_worker_with_less_to_compute_is_picked(policy: PolicyName) -> None:
    made = loaded(policy)
    busy, idle, _ = made.scene.workers
    made.report(busy, waiting_tokens=5_000)
    assert {made.choose().prefill for _ in range(20)} == {idle}


@pytest.mark.parametrize("policy", [PolicyName.LEAST_WORK, PolicyName.POWER_OF_TWO])
@pytest.mark.parametrize("load", [{"running": 12}, {"kv_used_tokens": 2**19}], ids=["requests", "memory"])
def test_the_decode_worker_with_more_room_is_picked(policy: PolicyName, load: dict[str, int]) -> None:
    made = loaded(policy, 1, 2)
    _, full, free = made.scene.workers
    made.report(full, **load)
    assert {made.choose().decode for _ in range(20)} == {free}


def test_a_prefill_worker_is_not_judged_by_what_decode_workers_are() -> None:
    made = loaded(PolicyName.LEAST_WORK)
    first, second, _ = made.scene.workers
    made.report(first, running=1_000, kv_used_tokens=2**20)
    made.report(second, waiting_tokens=5_000)
    assert made.choose().prefill == first


@pytest.mark.parametrize("policy", [PolicyName.LEAST_WORK, PolicyName.PREFIX, PolicyName.POWER_OF_TWO])
def test_a_worker_of_unknown_load_never_wins_over_an_idle_one(policy: PolicyName) -> None:
    made = loaded(policy, 2, 2)
    unknown, idle, unknown_decode, idle_decode = made.scene.workers
    for worker in (unknown, unknown_decode):
        made.costs.note(worker.start, None)
    for _ in range(20):
        route = made.choose()
        assert (route.prefill, route.decode) == (idle, idle_decode)


def test_a_worker_of_unknown_load_costs_what_others_have_at_the_mean_worker() -> None:
    made = loaded(PolicyName.LEAST_WORK, 3)
    unknown, less, more, _ = made.scene.workers
    made.costs.note(unknown.start, None)
    made.report(less, waiting_tokens=10_000)
    made.report(more, waiting_tokens=30_000)
    assert made.choose().prefill == less
    made.report(less, waiting_tokens=30_020)
    made.report(more, waiting_tokens=30_000)
    for _ in range(5):
        assert made.choose().prefill != unknown, "it is charged with the mean and one request more"
    made.report(less, waiting_tokens=90_000)
    assert made.choose().prefill == more
    made.report(more, waiting_tokens=92_000)
    made.report(less, waiting_tokens=10**6)
    assert made.choose().prefill == more, "the mean is 546,000"


@pytest.mark.parametrize("policy", [PolicyName.LEAST_WORK, PolicyName.PREFIX, PolicyName.POWER_OF_TWO])
@pytest.mark.parametrize("others_tokens", [0, 5_000], ids=["alone", "beside other frontends"])
def test_a_worker_that_hangs_does_not_get_all_while_the_others_load_is_unknown(
    policy: PolicyName, others_tokens: int
) -> None:
    """The known one is always cheaper than the mean of the known ones: what this frontend sent must count by itself."""
    made = loaded(policy, 2, 2)
    hanging, unknown, _, unknown_decode = made.scene.workers
    for worker in (unknown, unknown_decode):
        made.costs.note(worker.start, None)
    counts: Counter[str] = Counter()
    known = made.backlog.get(hanging.start)
    assert known is not None
    for _ in range(40):
        made.report(hanging, waiting_tokens=others_tokens + int(known.own_whole))
        route = made.choose()
        made.send(route)
        counts.update(worker.worker_id for worker in route.workers)
    for worker in (unknown, unknown_decode):
        assert 18 <= counts[worker.worker_id] <= 20, counts


def test_requests_sent_since_the_report_count() -> None:
    made = loaded(PolicyName.LEAST_WORK, 4, 4)
    counts: Counter[str] = Counter()
    sent = []
    for _ in range(40):
        route = made.choose()
        sent.append(made.send(route))
        counts.update(worker.worker_id for worker in route.workers)
    assert set(counts.values()) == {10}, "without a new report every worker gets its tenth request"
    for work, streaming in sent:
        work.drop()
        streaming.end()
        streaming.end()
    assert all(row.work == 0 for table in made.costs.tables.values() for row in table.rows.values())


def test_a_request_that_was_in_the_report_is_subtracted_when_it_ends() -> None:
    made = loaded(PolicyName.LEAST_WORK, 1, 2)
    _, first, second = made.scene.workers
    made.report(second, running=1_000)
    route = made.choose()
    assert route.decode == first
    _, streaming = made.send(route)
    made.report(first, running=8, kv_used_tokens=800)
    made.report(second, running=7, kv_used_tokens=700)
    assert made.choose().decode == second
    streaming.end()
    made.report(second, running=8, kv_used_tokens=800)
    assert made.choose().decode == first


def test_a_slow_worker_gets_less() -> None:
    made = loaded(PolicyName.LEAST_WORK)
    slow, fast, _ = made.scene.workers
    compute(made, slow, 4.0)
    compute(made, fast, 1.0)
    made.report_all()
    counts: Counter[Worker | None] = Counter()
    for _ in range(50):
        route = made.choose(1_000)
        made.send(route, 1_000)
        counts[route.prefill] += 1
    assert 3 * counts[slow] < counts[fast] < 5 * counts[slow]


def test_a_rate_measured_long_ago_no_longer_counts() -> None:
    made = loaded(PolicyName.LEAST_WORK)
    slow, fast, _ = made.scene.workers
    compute(made, slow, 50.0)
    compute(made, fast, 1.0, begin_s=1_050.0)
    assert {made.choose().prefill for _ in range(20)} == {fast}
    compute(made, fast, 1.0, begin_s=1_052.0 + RATE_KEPT_S)
    assert made.choose().prefill == slow, "it is taken for a mean worker again, and had less lately"
    compute(made, slow, 1.0, begin_s=1_054.0 + RATE_KEPT_S)
    assert made.choose().prefill == slow, "its first measurement is forgotten, not averaged with the new one"


def test_what_a_worker_computes_becomes_less_with_time() -> None:
    made = loaded(PolicyName.LEAST_WORK)
    first, second, _ = made.scene.workers
    for worker in (first, second):
        compute(made, worker, 1.0)
    made.report_all()
    for tokens, worker in ((9_936, first), (3_936, second)):
        work = made.backlog.reserve(tokens)
        work.sent(worker.start)
        if worker is first:
            made.clock.advance(8.0)
    assert made.choose().prefill == first, "2,000 tokens are left there, and 4,000 at the other"


def test_what_a_worker_computes_for_others_becomes_less_with_time_too() -> None:
    """The report says since when the worker has its first prompt in hand, of any frontend."""
    made = loaded(PolicyName.LEAST_WORK)
    first, second, _ = made.scene.workers
    for worker in (first, second):
        compute(made, worker, 1.0)
    for worker, tokens, in_hand_s in ((first, 9_936, 8.0), (second, 3_936, 0.0)):
        unfinished = UnfinishedPrompts(1, tokens, in_hand_s)
        made.costs.note(worker.start, EngineLoad(waiting_tokens=0, waiting_requests=0, unfinished=unfinished))
    assert made.choose().prefill == first, "2,000 tokens are left there, and 4,000 at the other"


def test_equal_workers_are_used_evenly_and_differently_by_each_frontend() -> None:
    orders = []
    for seed in range(4):
        made = Loaded(PolicyName.LEAST_WORK, *fleet(4), seed=seed)
        made.report_all()
        order = []
        for _ in range(8):
            route = made.choose()
            work, streaming = made.send(route)
            work.drop()
            streaming.end()
            order.append(route.prefill)
        assert set(Counter(order).values()) == {2}
        orders.append(tuple(order))
    assert len(set(orders)) > 1, "frontends must not all begin with the same worker"


def test_prefix_prefers_the_worker_that_has_the_prompt_cached() -> None:
    made = loaded(PolicyName.PREFIX, 4)
    cached = made.scene.workers[2]
    route = made.choose(1_000, {cached.start: 800})
    assert (route.prefill, route.expected_cached_tokens, route.pick.policy) == (cached, 800, "prefix")
    made.report(cached, waiting_tokens=700)
    assert made.choose(1_000, {cached.start: 800}).prefill == cached
    made.report(cached, waiting_tokens=2_000)
    route = made.choose(1_000, {cached.start: 800})
    assert route.prefill != cached, "recomputing 800 tokens takes less time than waiting for 2,000"
    assert route.expected_cached_tokens == 0


def test_prefix_regards_no_cache_of_an_earlier_start() -> None:
    made = loaded(PolicyName.PREFIX, 2)
    worker = made.scene.workers[0]
    assert made.choose(1_000, {(worker.worker_id, worker.epoch - 1): 1_000}).expected_cached_tokens == 0


def test_prefix_regards_the_caches_of_decode_workers_only_where_they_are_published() -> None:
    made = loaded(PolicyName.PREFIX, 1, 2)
    only, _, second = made.scene.workers
    prompt = {only.start: 900, second.start: 1_000_000}
    assert {made.choose(1_000_000, prompt).decode for _ in range(20)} == {second}


def test_auto_follows_the_caches() -> None:
    made = loaded(PolicyName.AUTO)
    assert made.choose(prompt={}).pick.policy == "prefix"
    made.caches.is_live = False
    route = made.choose(prompt={made.scene.workers[0].start: 100})
    assert (route.pick.policy, route.expected_cached_tokens) == ("least_work", None)
    made.caches.is_live = True
    assert made.choose(prompt={}).pick.policy == "prefix"


def test_a_prefix_that_only_one_idle_worker_has_starves_no_other() -> None:
    """Single-turn prompts with one shared beginning, each done before the next one comes."""
    made = loaded(PolicyName.PREFIX, 8)
    hot = made.scene.workers[0]
    done: Counter[str] = Counter()
    cached = {hot.start: 512}
    for _ in range(8_000):
        route = made.choose(1_024, cached)
        assert route.prefill is not None
        done[route.prefill.worker_id] += 1_024 - (route.expected_cached_tokens or 0)
        work, streaming = made.send(route, 1_024)
        work.drop()
        streaming.end()
    assert len(done) == 8
    assert min(done.values()) >= 0.8 * sum(done.values()) / 8


def test_a_single_conversation_stays_where_it_is_cached() -> None:
    made = loaded(PolicyName.PREFIX, 8)
    worker = made.choose(1_000, {}).prefill
    assert worker is not None
    for turn in range(1, 12):
        route = made.choose(1_000 * turn + 1_000, {worker.start: 1_000 * turn})
        assert route.prefill == worker
        work, streaming = made.send(route, 1_000 * turn + 1_000)
        work.drop()
        streaming.end()


def test_a_session_stays_with_its_worker_and_moves_when_that_leaves() -> None:
    made = loaded(PolicyName.SESSION, 8, 8)
    routes = {number: made.choose(session=str(number)).workers for number in range(64)}
    assert len({worker for workers in routes.values() for worker in workers}) == 16
    assert all(made.choose(session=str(number)).workers == workers for number, workers in routes.items())
    gone = made.scene.workers[0]
    made.scene.workers = made.scene.workers[1:]
    for number, (before, decoding) in routes.items():
        now = made.choose(session=str(number))
        assert now.decode == decoding
        assert (now.prefill == before) == (before != gone)


def test_a_late_report_of_a_prompt_that_has_ended_moves_no_session() -> None:
    made = loaded(PolicyName.SESSION, prefills=3)
    home = made.choose(session="a").computing
    unfinished = UnfinishedPrompts(1, 100)
    made.costs.note(home.start, EngineLoad(waiting_tokens=0, waiting_requests=0, unfinished=unfinished))
    assert made.choose(session="a").computing == home


def test_all_frontends_agree_on_the_worker_of_a_session() -> None:
    first, second = loaded(PolicyName.SESSION, 8), Loaded(PolicyName.SESSION, *reversed(fleet(8)), seed=9)
    for number in range(50):
        assert first.choose(session=str(number)) == second.choose(session=str(number))


def test_a_request_without_a_session_is_placed_by_its_tenant_or_by_load() -> None:
    made = loaded(PolicyName.SESSION, 8)
    assert len({made.choose(tenant="a").prefill for _ in range(20)}) == 1
    assert len({made.choose(tenant=str(number)).prefill for number in range(50)}) > 4
    made.report(made.scene.workers[0], waiting_tokens=9_000)
    for _ in range(20):
        route = made.choose()
        made.send(route)
        assert (route.prefill != made.scene.workers[0], route.pick.policy) == (True, "least_work")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 6))
@settings(max_examples=examples(100), deadline=None)
def test_no_worker_has_more_than_its_bound_of_sessions(sessions: list[str], workers: int) -> None:
    made = loaded(PolicyName.SESSION, workers, workers)
    counts: Counter[str] = Counter()
    for number, session in enumerate(sessions, start=1):
        route = made.choose(session=session)
        made.send(route)
        counts.update(worker.worker_id for worker in route.workers)
        assert max(counts.values()) < LOAD_BOUND * number / workers + 1


WORKERS = fleet(3, 3), (aggregated("a", **LARGE), aggregated("b", **LARGE), *fleet(1, 2))
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["send", "end", "report", "silence", "leave", "come"]),
        st.integers(0, 5),
        st.integers(0, 5_000),
        st.booleans(),
    ),
    max_size=40,
)


@given(st.sampled_from(POLICIES), st.sampled_from(WORKERS), EVENTS)
@settings(max_examples=examples(150), deadline=None)
def test_whatever_happens_a_member_is_picked(
    policy: PolicyName, workers: tuple[Worker, ...], events: list[Any]
) -> None:
    made = Loaded(policy, *workers)
    sent: list[Any] = []
    for kind, number, tokens, has_session in events:
        worker = workers[number % len(workers)]
        if kind == "send" and any(w.role.value != "prefill" for w in made.scene.workers):
            possible = {w.start for w in made.scene.workers}
            if not {"aggregated"} & {w.role.value for w in made.scene.workers}:
                roles = {w.role.value for w in made.scene.workers}
                if roles != {"prefill", "decode"}:
                    continue
            elif not possible:
                continue
            route = made.choose(tokens + 1, {worker.start: tokens // 2}, session="s" if has_session else "")
            assert {w.start for w in route.workers} <= possible
            sent.append(made.send(route, tokens + 1))
        elif kind == "end" and sent:
            work, streaming = sent.pop(number % len(sent))
            work.drop()
            streaming.end()
        elif kind == "report":
            made.report(worker, tokens, number, tokens)
        elif kind == "silence":
            made.costs.note(worker.start, None)
        elif kind == "leave":
            left = tuple(w for w in made.scene.workers if w.worker_id != worker.worker_id)
            made.scene.workers = left
            made.scene.routes.follow(left)
        elif kind == "come":
            others = tuple(w for w in made.scene.workers if w.worker_id != worker.worker_id)
            made.scene.workers = (*others, replace(worker, epoch=worker.epoch + 1) if has_session else worker)
            made.scene.routes.follow(made.scene.workers)
    for work, streaming in sent:
        work.drop()
        streaming.end()
    for table in made.costs.tables.values():
        assert table.requests_sum >= -1e-6
        assert all(row.work >= 0 and row.assigned >= 0 for row in table.rows.values())
