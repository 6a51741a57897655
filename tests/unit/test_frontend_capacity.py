"""Free capacity of the workers; the running sums equal a recount over all workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.admission.capacity import ANSWER_TOKENS_MAX, FAIR_FRACTION, QUEUED_FRACTION, QUEUED_MIN, Capacity

from tandem.clock import ManualClock
from tandem.domain.worker import LEG_CONTRACT, EngineLoad, Start, Worker, WorkerRole, WorkerState
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import aggregated, decode, prefill


def capacity(*loads: EngineLoad | None) -> Capacity:
    headroom = Capacity(decode().capabilities.model)
    workers = [decode(f"decode-{number}") for number in range(len(loads))]
    headroom.follow((prefill(), *workers))
    for worker, load in zip(workers, loads, strict=True):
        headroom.note(worker.start, load)
    return headroom


def test_free_capacity_is_capacity_minus_load() -> None:
    own = decode().capabilities
    whole = capacity(None, None)
    most = 2 * (own.running_requests_max + max(2, own.running_requests_max // 4))
    assert whole.fits(most - 1, 0, 1)
    assert not whole.fits(most, 0, 1)
    assert whole.fits(1, 0, 2 * own.kv_capacity_tokens)
    assert not whole.fits(1, 1, 2 * own.kv_capacity_tokens)
    busy = EngineLoad(running_requests=most // 2 - 1, waiting_requests=0, kv_used_tokens=100)
    shared = capacity(busy, busy)
    assert shared.fits(1, 0, 1)
    full = EngineLoad(running_requests=most // 2 - 1, waiting_requests=1, kv_used_tokens=100)
    assert not capacity(full, full).fits(most // 2, 0, 1)
    assert shared.fits(1, 0, 2 * own.kv_capacity_tokens - 200)
    assert not shared.fits(1, 0, 2 * own.kv_capacity_tokens - 199)


def test_capacity_that_this_frontend_releases_is_free_at_once() -> None:
    """The next reported load is a second away."""
    most = decode().capabilities.running_requests_max * 5 // 4
    full = capacity(EngineLoad(running_requests=most, waiting_requests=0, kv_used_tokens=0))
    own = most // 2
    assert not full.fits(own, 0, 1)
    assert full.fits(own - 1, 0, 1)
    assert not full.fits(own, 0, 1)


def test_a_frontend_with_less_than_the_others_may_exceed_the_capacity() -> None:
    """Otherwise the first frontends would take all capacity that becomes free."""
    most = decode().capabilities.running_requests_max * 5 // 4
    reported = EngineLoad(running_requests=most, waiting_requests=0, kv_used_tokens=0)
    few = capacity(reported)
    assert few.fits(1, 0, 1)
    assert not few.fits(2, 0, 1), "no more than one beyond the capacity"
    many = capacity(reported)
    assert not many.fits(most - 1, 0, 1)


def test_requests_of_this_frontend_are_not_counted_twice() -> None:
    own = decode().capabilities
    loads = EngineLoad(running_requests=3, waiting_requests=0, kv_used_tokens=300)
    assert capacity(loads).fits(3, 300, own.kv_capacity_tokens - 300)


def test_a_wrong_load_uses_up_only_its_own_workers_capacity() -> None:
    wrong = EngineLoad(running_requests=2**31 - 1, waiting_requests=-5, kv_used_tokens=2**31 - 1)
    own = decode().capabilities
    assert capacity(wrong, None).fits(1, 0, own.kv_capacity_tokens)
    negative = EngineLoad(running_requests=-(2**31), kv_used_tokens=-(2**31))
    assert not capacity(negative).fits(1, 1, own.kv_capacity_tokens)


def test_one_request_always_fits() -> None:
    """A prompt longer than what is free, or a wrong load, must not block a frontend for ever."""
    full = EngineLoad(running_requests=10**6, waiting_requests=10**6, kv_used_tokens=10**9)
    assert capacity(full).fits(0, 0, 10**9)


def test_without_workers_every_request_fits() -> None:
    assert capacity().fits(50, 10**9, 10**9)


def test_for_a_while_after_the_last_worker_as_many_requests_fit_as_before() -> None:
    """Its successor must not get all that waits for it at once."""
    clock = ManualClock(100.0)
    headroom = Capacity("m", clock, no_worker_wait_s=5.0)
    assert headroom.fits(50, 0, 1), "no worker has been known: routing refuses it"
    headroom.follow([decode()])
    running = decode().capabilities.running_requests_max
    most = running + max(QUEUED_MIN, int(running * QUEUED_FRACTION))
    headroom.follow([])
    clock.advance(4.9)
    headroom.follow([])
    assert headroom.fits(most - 1, 0, 10**9)
    assert not headroom.fits(most, 0, 1)
    clock.advance(0.1)
    assert headroom.fits(most, 0, 1), "nothing waits for it any more"


def test_a_request_is_charged_for_what_an_engine_reserves() -> None:
    headroom, most = capacity(None, None), decode().capabilities
    whole = min(most.context_tokens_max, most.kv_capacity_tokens)
    assert headroom.counted(10, 20) == 30
    assert headroom.counted(10, 10**6) == min(10 + ANSWER_TOKENS_MAX, whole)
    assert headroom.counted(10**6, 10**6) == whole
    assert capacity().counted(7, 5) == 12


class Counted:
    """The same capacity, recounted over all workers for each call."""

    def __init__(self) -> None:
        self.workers: tuple[Worker, ...] = ()
        self.loads: dict[Start, EngineLoad] = {}
        self.reported = self.others = (0, 0)

    def streaming(self) -> list[Worker]:
        return [
            worker
            for worker in self.workers
            if worker.role is not WorkerRole.PREFILL
            and worker.state is WorkerState.SERVING
            and worker.leg_contract == LEG_CONTRACT
            and worker.capabilities.model == "m"
        ]

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        tokens = prompt_tokens + min(answer_tokens, ANSWER_TOKENS_MAX)
        each = [w.capabilities for w in self.streaming()]
        return min(tokens, max((min(c.context_tokens_max, c.kv_capacity_tokens) for c in each), default=tokens))

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        streaming = self.streaming()
        if not streaming or held_requests == 0:
            return True
        reported_requests = reported_tokens = requests_max = tokens_max = 0
        for worker in streaming:
            running = worker.capabilities.running_requests_max
            most = running + max(QUEUED_MIN, int(running * QUEUED_FRACTION))
            load = self.loads.get(worker.start, EngineLoad())
            reported_requests += min(max(0, (load.running_requests or 0) + (load.waiting_requests or 0)), most)
            reported_tokens += min(max(0, load.kv_used_tokens or 0), worker.capabilities.kv_capacity_tokens)
            requests_max += most
            tokens_max += worker.capabilities.kv_capacity_tokens
        if (reported_requests, reported_tokens) != self.reported:
            self.reported = reported_requests, reported_tokens
            self.others = max(0, reported_requests - held_requests), max(0, reported_tokens - held_tokens)
        others_requests, others_tokens = self.others
        if held_requests < others_requests:
            requests_max += max(1, int(requests_max * FAIR_FRACTION))
        return held_requests + others_requests < requests_max and held_tokens + others_tokens + tokens <= tokens_max


COUNTS = st.one_of(st.none(), st.integers(-3, 30))
LOADS = st.one_of(
    st.none(),
    st.builds(
        EngineLoad,
        running_requests=COUNTS,
        waiting_requests=COUNTS,
        kv_used_tokens=st.one_of(COUNTS, st.just(10**6)),
    ),
)
WORKERS = st.builds(
    lambda make, worker_id, epoch, state, leg_contract, **capabilities: replace(
        make(worker_id, **capabilities), epoch=epoch, state=state, leg_contract=leg_contract
    ),
    make=st.sampled_from([decode, decode, aggregated, prefill]),
    worker_id=st.sampled_from("abcd"),
    epoch=st.integers(1, 2),
    state=st.sampled_from([WorkerState.SERVING, WorkerState.SERVING, WorkerState.DRAINING]),
    leg_contract=st.sampled_from([LEG_CONTRACT] * 5 + [1]),
    model=st.sampled_from(["m"] * 5 + ["other"]),
    running_requests_max=st.sampled_from([0, 1, 4, 16]),
    kv_capacity_tokens=st.sampled_from([8, 64, 4096]),
    context_tokens_max=st.sampled_from([16, 2048]),
)
STEPS = st.one_of(
    st.tuples(st.just("view"), st.lists(WORKERS, max_size=4, unique_by=lambda worker: worker.worker_id).map(tuple)),
    st.tuples(st.just("load"), st.tuples(st.sampled_from("abcd"), st.integers(1, 2)), LOADS),
    st.tuples(st.just("fits"), st.integers(0, 40), st.integers(0, 9000), st.sampled_from([1, 8, 64, 4096])),
    st.tuples(st.just("counted"), st.sampled_from([1, 8, 64, 4096]), st.sampled_from([0, 1, 10**6])),
)


@given(st.lists(STEPS, max_size=40))
@settings(max_examples=examples(300), deadline=None)
def test_running_sums_equal_a_recount(steps: list[Any]) -> None:
    headroom, model = Capacity("m"), Counted()
    for kind, *given_ in steps:
        if kind == "view":
            model.workers = given_[0]
            headroom.follow(model.workers)
        elif kind == "load":
            start, load = given_
            model.loads.pop(start, None)
            if load is not None:
                model.loads[start] = load
            headroom.note(start, load)
        else:
            assert getattr(headroom, kind)(*given_) == getattr(model, kind)(*given_)
    headroom.follow(())
    assert (
        headroom._requests,
        headroom._tokens,
        headroom._requests_max,
        headroom._tokens_max,
        headroom._request_tokens,
    ) == (
        0,
        0,
        0,
        0,
        [],
    )
