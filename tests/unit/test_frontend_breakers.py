"""Circuit breakers: what opens one, what must not, how it closes, and that some workers always remain."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tandem_frontend.routing.circuit_breaker import (
    FORGIVEN_S,
    INTERVAL_S,
    OPEN_FIRST_S,
    OPEN_MAX_S,
    PROBE_S,
    STRIKES_MAX,
    BreakerState,
    CircuitBreaker,
    CircuitBreakers,
)

from tandem.clock import ManualClock
from tandem.domain.worker import Start, Worker, WorkerState
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import decode, prefill

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class Scene:
    """Workers whose results a test reports."""

    def __init__(self, *workers: Worker) -> None:
        self.clock = ManualClock(100.0)
        self.unhealthy: frozenset[Start] = frozenset()
        self.breakers = CircuitBreakers(self.clock, random.Random(1), lambda: self.unhealthy)
        self.workers = workers
        self.ill: set[Start] = set()
        """Workers that never succeed."""
        self.breakers.follow(workers)

    def result(self, worker: Worker, *, good: bool) -> None:
        sent_s = self.breakers.sent([worker])
        (self.breakers.succeeded if good else self.breakers.failed)(worker, sent_s)

    def intervals(self, count: int, *failing: Worker, every_s: float = 1.1 * INTERVAL_S) -> None:
        """`count` intervals in which these workers fail one request each, and all other healthy ones succeed once."""
        for _ in range(count):
            for worker in failing:
                self.result(worker, good=False)
            self.clock.advance(every_s)
            self.breakers.ejected()
            for worker in self.workers:
                if worker not in failing and worker.start not in self.ill:
                    self.result(worker, good=True)

    def state(self, worker: Worker) -> BreakerState:
        return self.breakers.states().get(worker.start, CLOSED)

    def until_probe(self, worker: Worker) -> float:
        """Advance the clock until a request may be sent there."""
        begin_s = self.clock()
        while worker.start in self.breakers.ejected():
            self.clock.advance(0.01)
        return self.clock() - begin_s


def decodes(count: int) -> Scene:
    """That have all succeeded before."""
    scene = Scene(*(decode(f"decode-{number}") for number in range(count)))
    scene.intervals(1)
    return scene


def test_a_worker_that_fails_while_its_peers_succeed_is_ejected() -> None:
    scene = decodes(2)
    bad, good = scene.workers
    scene.intervals(STRIKES_MAX - 1, bad)
    assert not scene.breakers.ejected()
    scene.intervals(1, bad)
    assert scene.breakers.ejected() == {bad.start}
    assert (scene.state(bad), scene.state(good)) == (OPEN, CLOSED)


def test_successes_take_strikes_back() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.intervals(STRIKES_MAX - 1, bad)
    scene.intervals(STRIKES_MAX - 1)
    scene.intervals(STRIKES_MAX - 1, bad)
    assert scene.state(bad) is CLOSED


def test_many_failures_within_one_interval_count_once() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.ill.add(bad.start)
    for _ in range(50):
        scene.result(bad, good=False)
    scene.intervals(1)
    assert scene.state(bad) is CLOSED
    scene.intervals(STRIKES_MAX - 1, bad)
    assert scene.state(bad) is OPEN


def test_failures_while_no_peer_succeeds_are_no_strikes() -> None:
    """One after the other, each in an interval of its own."""
    scene = decodes(3)
    scene.intervals(1)
    for _ in range(20):
        for worker in scene.workers:
            scene.result(worker, good=False)
            scene.clock.advance(2 * INTERVAL_S)
            scene.breakers.ejected()
    assert not scene.breakers.states()


def test_a_worker_without_peers_is_never_ejected() -> None:
    scene = Scene(prefill(), decode("decode-0"), decode("decode-1", page_size_tokens=64))
    scene.intervals(20, decode("decode-0"))
    assert not scene.breakers.states(), "no peer could replace it"


def test_at_most_half_are_ejected() -> None:
    scene = decodes(5)
    # One after the other: failures within one interval excuse each other.
    for worker in scene.workers[:4]:
        scene.ill.add(worker.start)
        scene.intervals(2 * STRIKES_MAX, worker)
    assert len(scene.breakers.states()) == 2
    assert len(scene.breakers.ejected()) <= 2


def test_an_unhealthy_worker_does_not_count_as_a_replacement() -> None:
    scene = decodes(2)
    bad, dead = scene.workers
    scene.unhealthy = frozenset({dead.start})
    scene.intervals(5 * STRIKES_MAX, bad)
    assert scene.state(bad) is CLOSED


def test_a_fleet_that_shrinks_uses_ejected_workers_again() -> None:
    scene = decodes(4)
    scene.ill = {worker.start for worker in scene.workers[:2]}
    for worker in scene.workers[:2]:
        scene.intervals(STRIKES_MAX, worker)
    scene.breakers.sent(scene.workers)
    assert len(scene.breakers.ejected()) == 2
    scene.breakers.follow(scene.workers[:2])
    assert len(scene.breakers.ejected()) == 1
    scene.breakers.follow([scene.workers[0], replace(scene.workers[1], state=WorkerState.DRAINING)])
    assert not scene.breakers.ejected()


def test_a_restarted_worker_begins_with_a_closed_breaker() -> None:
    scene = decodes(2)
    bad, good = scene.workers
    scene.intervals(STRIKES_MAX, bad)
    newer = replace(bad, epoch=bad.epoch + 1)
    scene.breakers.follow([newer, good])
    assert not scene.breakers.ejected()
    assert scene.state(newer) is CLOSED


def test_one_probe_at_a_time() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.intervals(STRIKES_MAX, bad)
    assert scene.until_probe(bad) + 2 * INTERVAL_S >= OPEN_FIRST_S / 2 - 0.02
    assert scene.state(bad) is OPEN
    sent_s = scene.breakers.sent([bad])
    assert scene.state(bad) is HALF_OPEN
    assert scene.breakers.ejected() == {bad.start}, "a second one goes beside the probe"
    scene.clock.advance(0.1)
    scene.breakers.succeeded(bad, sent_s)
    assert scene.state(bad) is CLOSED
    assert not scene.breakers.ejected()


def test_ejected_workers_are_computed_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, determined = decodes(2), list[Any]()
    bad, good = scene.workers
    compute = scene.breakers._compute_ejected

    def counted(*now: Any) -> Any:
        determined.append(now)
        return compute(*now)

    monkeypatch.setattr(scene.breakers, "_compute_ejected", counted)
    scene.intervals(STRIKES_MAX, bad)
    before = scene.breakers.ejected()
    assert before == {bad.start}
    determined.clear()
    for _ in range(50):
        scene.result(good, good=True)
        assert scene.breakers.ejected() is before
    assert not determined
    scene.until_probe(bad)
    assert len(determined) == 1
    scene.unhealthy = frozenset({bad.start})
    assert not scene.breakers.ejected()
    scene.unhealthy = frozenset()
    scene.breakers.sent([bad])
    assert scene.breakers.ejected() == {bad.start}


def test_workers_of_another_leg_contract_are_no_peers() -> None:
    """They could not replace it: no request is sent to them."""
    bad, old = decode("decode-0"), replace(decode("decode-1"), leg_contract=1)
    scene = Scene(bad, old)
    scene.result(old, good=True)
    scene.intervals(3 * STRIKES_MAX, bad)
    assert not scene.breakers.states()


def test_a_probe_without_a_result_is_replaced() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.intervals(STRIKES_MAX, bad)
    scene.until_probe(bad)
    scene.breakers.sent([bad])
    assert PROBE_S - 0.1 < scene.until_probe(bad) < PROBE_S + 0.1


def test_a_request_sent_before_the_opening_is_no_probe() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    early_s = scene.breakers.sent([bad])
    scene.intervals(STRIKES_MAX, bad)
    scene.breakers.succeeded(bad, early_s)
    assert scene.state(bad) is OPEN
    scene.until_probe(bad)
    scene.breakers.failed(bad, early_s)
    assert not scene.breakers.ejected(), "a late failure counts against the next probe"


def test_a_request_without_another_route_is_no_probe() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.intervals(STRIKES_MAX, bad)
    for _ in range(20):
        scene.breakers.failed(bad, scene.breakers.sent([bad]))
    assert scene.until_probe(bad) <= OPEN_FIRST_S, "a burst in which all are tried keeps it out for long"
    scene.intervals(5, bad)
    scene.breakers.succeeded(bad, scene.breakers.sent([bad]))
    assert scene.state(bad) is CLOSED


def test_a_breaker_stays_open_for_longer_each_time_up_to_a_bound() -> None:
    scene = decodes(2)
    bad, _ = scene.workers
    scene.intervals(STRIKES_MAX, bad)
    waits_s = []
    for _ in range(12):
        waits_s.append(scene.until_probe(bad))
        scene.breakers.failed(bad, scene.breakers.sent([bad]))
    assert waits_s[4] > 4 * OPEN_FIRST_S
    assert max(waits_s) <= OPEN_MAX_S + 0.02
    assert len({round(wait_s, 2) for wait_s in waits_s[6:]}) > 1, "no jitter: all frontends would probe together"


def test_an_opening_after_a_long_time_is_a_first_one() -> None:
    breaker = CircuitBreaker(random.Random(0))
    for _ in range(8):
        breaker.open(breaker.until_s if breaker.state is OPEN else 0.0)
    breaker.sent(breaker.until_s)
    probe_s = breaker.until_s - PROBE_S
    assert breaker.succeed(probe_s, probe_s)
    again_s = probe_s + FORGIVEN_S / 2
    breaker.open(again_s)
    assert breaker.until_s - again_s >= OPEN_MAX_S / 2, "it was forgiven too soon"
    breaker.sent(breaker.until_s)
    assert breaker.succeed(breaker.until_s, breaker.until_s)
    later_s = breaker.until_s + FORGIVEN_S + 1
    breaker.open(later_s)
    assert breaker.until_s - later_s <= OPEN_FIRST_S


def test_a_worker_that_fails_most_of_its_requests_is_ejected() -> None:
    scene = decodes(3)
    bad = scene.workers[0]
    scene.ill = {bad.start}
    for number in range(8 * STRIKES_MAX):
        scene.result(bad, good=not number % 3)
        scene.intervals(1)
        if scene.state(bad) is OPEN:
            return
    raise AssertionError("two of three requests fail, and it goes on")


def test_a_worker_that_fails_a_request_now_and_then_is_not_ejected() -> None:
    scene = decodes(3)
    for number in range(200):
        scene.result(scene.workers[0], good=bool(number % 4))
        scene.intervals(1)
    assert not scene.breakers.states()


@pytest.mark.parametrize("fleet", [16, 8])
def test_two_bad_workers_of_many_are_ejected(fleet: int) -> None:
    scene = decodes(fleet)
    scene.ill = {worker.start for worker in scene.workers[:2]}
    scene.intervals(STRIKES_MAX, *scene.workers[:2])
    is_large = fleet * (1 / 8) > 1
    assert set(scene.breakers.states()) == (scene.ill if is_large else set())


TICKS = st.lists(st.tuples(st.sampled_from(["well", "burst", "rest"]), st.integers(1, 8)), max_size=40)


@given(TICKS, st.integers(2, 6), st.randoms(use_true_random=False))
@settings(max_examples=examples(60), deadline=None)
def test_bursts_of_failures_at_all_workers_open_nothing(
    ticks: list[tuple[str, int]], count: int, rng: random.Random
) -> None:
    """However often they come, in any order of workers, and whatever succeeds between them."""
    scene = decodes(count)
    for kind, repeats in ticks:
        for _ in range(repeats if kind != "rest" else 0):
            for worker in rng.sample(scene.workers, count):
                scene.result(worker, good=kind == "well")
                scene.clock.advance(INTERVAL_S / 2 / count)
        scene.clock.advance(INTERVAL_S * 1.5)
        assert not scene.breakers.ejected()
    assert not scene.breakers.states()


class BreakersMachine(RuleBasedStateMachine):
    """Any results of any workers in any order, in a fleet that changes: never more than half, never all."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene(*(decode(f"decode-{number}") for number in range(6)), prefill())
        self.probes: dict[Start, float] = {}

    @rule(number=st.integers(0, 6), good=st.booleans())
    def result(self, number: int, good: bool) -> None:
        self.scene.result(self.scene.workers[number], good=good)

    @rule(number=st.integers(0, 5), count=st.integers(1, 8))
    def fail_among_peers_that_work(self, number: int, count: int) -> None:
        self.scene.intervals(count, self.scene.workers[number])

    @rule(seconds=st.floats(0, 12))
    def let_time_pass(self, seconds: float) -> None:
        self.scene.clock.advance(seconds)

    @rule(numbers=st.sets(st.integers(0, 6)))
    def change_the_view(self, numbers: set[int]) -> None:
        self.scene.breakers.follow(self.scene.workers[number] for number in numbers)

    @rule(numbers=st.sets(st.integers(0, 6)))
    def change_health(self, numbers: set[int]) -> None:
        self.scene.unhealthy = frozenset(self.scene.workers[number].start for number in numbers)

    @rule()
    def probe(self) -> None:
        """A worker whose probe is due gets one request, and no more until there is a result."""
        scene = self.scene
        for start, state in scene.breakers.states().items():
            worker = next(worker for worker in scene.workers if worker.start == start)
            if state is OPEN and start not in scene.breakers.ejected():
                scene.breakers.sent([worker])

    @invariant()
    def some_are_left(self) -> None:
        breakers = self.scene.breakers
        ejected = breakers.ejected()
        assert ejected <= breakers.states().keys()
        assert breakers.ejected() is ejected, "each request would have another object"
        assert ejected == breakers._compute_ejected(self.scene.unhealthy, self.scene.clock()), (
            "the cached set is out of date"
        )
        view = [worker.start for worker in self.scene.workers if worker.start in breakers._peers_of]
        healthy = [start for start in view if start[0] != "prefill-0" and start not in self.scene.unhealthy]
        assert len(ejected) <= len(healthy) // 2
        assert ("prefill-0", 7) not in ejected
        assert not ejected & self.scene.unhealthy


BreakersMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=25, deadline=None)
TestBreakersMachine = BreakersMachine.TestCase
