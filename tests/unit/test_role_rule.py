"""The controller's rule: when a worker takes another role, which one, and every reason for which none does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tandem.controller.figures import Counts, LoadSampler, Observation, SeenWorker, Traffic
from tandem.controller.rule import Decision, RoleRule
from tandem.controller.settings import rule_settings
from tandem.domain.decision import Why
from tandem.domain.worker import EngineLoad, WorkerRole, WorkerState
from tests.wire.support.registry_host import make_worker

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED
SPEED, STEP_S = 1_000.0, 0.01
PLACES = 8
"""Of `make_worker`."""


@dataclass
class Fleet:
    """A fleet whose load is set: busy shares of prefill, requests of each decode worker."""

    roles: dict[str, WorkerRole]
    busy: float = 0.3
    waiting_tokens: int = 0
    queue: int = 0
    streams: int = 1
    at_s: float = 1_000.0
    is_live: bool = True
    may_take: frozenset[WorkerRole] = frozenset({PREFILL, DECODE})
    draining: str = ""
    silent: str = ""
    has_traffic: bool = True
    ended: int = 0
    counts: dict[tuple[str, int], Counts] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)

    def observe(self, after_s: float = 1.0) -> Observation:
        self.at_s += after_s
        self.ended += 1
        return Observation(
            at_s=self.at_s,
            is_live=self.is_live,
            workers=tuple(self._seen(worker_id, role, after_s) for worker_id, role in self.roles.items()),
            traffic=Traffic(open_requests=9, waiting_requests=self.queue, ended_requests=self.ended)
            if self.has_traffic
            else None,
        )

    def _seen(self, worker_id: str, role: WorkerRole, after_s: float) -> SeenWorker:
        worker = replace(make_worker(worker_id, self.epochs.get(worker_id, 1)), role=role)
        if worker_id == self.draining:
            worker = replace(worker, state=WorkerState.DRAINING)
        before = self.counts.get(worker.start, Counts())
        busy_s = after_s * (self.busy if role is PREFILL else 1.0)
        counts = self.counts[worker.start] = Counts(
            sampled_s=before.sampled_s + after_s,
            busy_s=before.busy_s + busy_s,
            stream_s=before.stream_s + (after_s * self.streams if role is DECODE else 0),
            computed_tokens=before.computed_tokens + (round(SPEED * busy_s) if role is PREFILL else 0),
            emitted_tokens=before.emitted_tokens + (round(after_s * self.streams / STEP_S) if role is DECODE else 0),
        )
        load = EngineLoad(
            running_requests=self.streams if role is DECODE else 0,
            waiting_requests=1 if self.waiting_tokens and role is PREFILL else 0,
            waiting_tokens=self.waiting_tokens if role is PREFILL else 0,
            kv_used_tokens=0,
            kv_capacity_tokens=4096,
        )
        return SeenWorker(
            worker=worker, load=None if worker_id == self.silent else load, counts=counts, roles=self.may_take
        )

    def take(self, decision: Decision) -> None:
        assert decision.start is not None
        assert decision.role is not None
        worker_id, epoch = decision.start
        self.roles[worker_id] = decision.role
        self.epochs[worker_id] = epoch + 1


def fleet(prefill: int = 2, decode: int = 2, **more: Any) -> Fleet:
    roles = {f"{role.value}-{n}": role for role, count in ((PREFILL, prefill), (DECODE, decode)) for n in range(count)}
    return Fleet(roles, **more)


def rule(**changes: Any) -> RoleRule:
    settings = rule_settings(ttft_s=2.0, itl_s=0.1)
    return RoleRule(replace(settings, **changes))


def decided(rule: RoleRule, fleet: Fleet, seconds: int = 30) -> Decision:
    """The last decision, or the first change."""
    for _ in range(seconds):
        decision = rule.decide(fleet.observe())
        if decision.why is Why.CHANGE:
            break
    return decision


def test_roles_that_fit_stay() -> None:
    decision = decided(rule(), fleet())
    assert (decision.why, decision.start) == (Why.WITHIN, None)
    assert decision.words.startswith("the roles fit the load: needs 0.8 prefill and 0.3 decode workers, has 2 and 2")


def test_prefill_that_is_busy_gets_the_idlest_decode_worker() -> None:
    decision = decided(rule(), fleet(busy=1.0))
    assert (decision.why, decision.start, decision.role) == (Why.CHANGE, ("decode-0", 1), PREFILL)
    assert "decode-0 takes the role prefill" in decision.words


def test_decode_that_is_full_gets_a_prefill_worker() -> None:
    decision = decided(rule(), fleet(busy=0.1, streams=PLACES))
    assert (decision.why, decision.start, decision.role) == (Why.CHANGE, ("prefill-0", 1), DECODE)


def test_a_queue_counts_before_prefill_is_busy() -> None:
    assert decided(rule(), fleet(busy=0.7)).why is Why.WITHIN
    assert decided(rule(), fleet(busy=0.7, waiting_tokens=9_000)).role is PREFILL


def test_a_queue_in_front_of_full_decode_workers_is_not_prefills() -> None:
    decision = decided(rule(), fleet(busy=0.5, streams=PLACES, queue=50))
    assert decision.role is DECODE


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"is_live": False}, Why.STALE_VIEW),
        ({"draining": "prefill-1"}, Why.IN_PROGRESS),
        ({"silent": "decode-1"}, Why.NO_FIGURES),
        ({"has_traffic": False}, Why.NO_FIGURES),
        ({"may_take": frozenset({DECODE})}, Why.CANNOT_TAKE),
    ],
)
def test_a_limit_keeps_the_roles(change: dict[str, Any], why: Why) -> None:
    decision = decided(rule(), fleet(busy=1.0, **change), 60)
    assert (decision.why, decision.start) == (why, None)


def test_the_last_worker_of_a_role_keeps_it() -> None:
    decision = decided(rule(), fleet(prefill=3, decode=1, busy=1.0), 60)
    assert (decision.why, decision.start) == (Why.LAST_WORKER, None)


def test_a_fleet_without_pairs_is_not_changed() -> None:
    alone = Fleet({"aggregated-0": AGGREGATED})
    assert decided(rule(), alone).why is Why.NO_PAIR


def test_too_few_workers_of_both_roles_change_nothing() -> None:
    assert decided(rule(), fleet(busy=1.0, streams=PLACES), 60).why is Why.NO_GAIN


def test_a_change_must_be_wanted_without_a_pause() -> None:
    busy, tested = fleet(), rule(confirm_s=10.0)
    decided(tested, busy)
    for _ in range(4):
        busy.waiting_tokens = 30_000
        for _ in range(5):
            assert tested.decide(busy.observe()).why in (Why.WITHIN, Why.UNCONFIRMED)
        busy.waiting_tokens = 0
        for _ in range(20):
            assert tested.decide(busy.observe()).start is None


def test_a_second_change_waits_and_a_reversal_waits_longer_each_time() -> None:
    tested, busy = rule(), fleet(prefill=3, decode=4, busy=1.0)
    busy.take(decided(tested, busy))
    begin_s = busy.at_s
    second = decided(tested, busy, 100)
    assert second.role is PREFILL
    assert busy.at_s - begin_s >= 3.0
    busy.take(second)
    pauses = []
    for role, busy_share, streams in ((DECODE, 0.1, PLACES), (PREFILL, 1.0, 1), (DECODE, 0.1, PLACES)):
        busy.busy, busy.streams, begin_s = busy_share, streams, busy.at_s
        decision = decided(tested, busy, 2_000)
        assert decision.role is role
        pauses.append(busy.at_s - begin_s)
        busy.take(decision)
    assert 120 <= pauses[0] < 150
    assert 240 <= pauses[1] < 270
    assert 480 <= pauses[2] < 510


def test_a_change_by_someone_else_starts_the_pauses_too() -> None:
    tested, busy = rule(), fleet(prefill=2, decode=3)
    decided(tested, busy)
    busy.roles["decode-2"], busy.epochs["decode-2"] = PREFILL, 2
    busy.busy, busy.streams = 0.1, PLACES
    for _ in range(100):
        assert tested.decide(busy.observe()).start is None


def test_rule_worker_that_keeps_crashing_into_its_first_role_lengthens_no_pause() -> None:
    tested, busy = rule(), fleet(prefill=3, decode=4, busy=1.0)
    for _ in range(5):
        busy.take(decision := decided(tested, busy, 200))
        assert (decision.role, decision.start) == (PREFILL, ("decode-0", busy.epochs["decode-0"] - 1))
        decided(tested, busy, 1)
        # Its process dies, and starts as its settings say.
        busy.roles["decode-0"], busy.epochs["decode-0"] = DECODE, busy.epochs["decode-0"] + 1
        decided(tested, busy, 1)
    busy.take(decided(tested, busy, 200))
    busy.busy, busy.streams, begin_s = 0.1, PLACES, busy.at_s
    assert decided(tested, busy, 2_000).role is DECODE
    assert 120 <= busy.at_s - begin_s < 150, "the pause of a first reversal"


def test_rule_pause_of_many_reversals_by_an_operator_is_bounded() -> None:
    tested, busy = rule(), fleet(prefill=3, decode=3)
    for number in range(40):
        for role in (PREFILL, DECODE):
            busy.roles[f"new-{number}-{role.value}"] = DECODE if role is PREFILL else PREFILL
            decided(tested, busy, 1)
            busy.roles[f"new-{number}-{role.value}"] = role
            decided(tested, busy, 1)
    busy.roles = {f"{role.value}-{n}": role for role in (PREFILL, DECODE) for n in range(3)}
    busy.busy, begin_s = 1.0, busy.at_s
    assert decided(tested, busy, 4_000).role is PREFILL
    assert 1_900 <= busy.at_s - begin_s < 1_960


def test_rule_change_to_aggregated_settles_and_is_no_direction() -> None:
    tested, busy = rule(), fleet(prefill=3, decode=4, busy=1.0)
    decided(tested, busy, 1)
    busy.roles["prefill-2"] = AGGREGATED
    begin_s = busy.at_s
    assert decided(tested, busy, 60).role is PREFILL
    assert 3 <= busy.at_s - begin_s < 60, "it settles, and is no reversal"


def test_a_worker_that_refused_is_passed_over() -> None:
    tested, busy = rule(), fleet(busy=1.0)
    first = decided(tested, busy)
    assert first.start is not None
    tested.refused(first.start, busy.at_s)
    assert decided(tested, busy).start == ("decode-1", 1)


def test_the_sampler_sums_what_reports_say() -> None:
    sampler, start = LoadSampler(), ("w", 1)
    for second, running in enumerate((0, 2, 2, 0, 0)):
        load = EngineLoad(running_requests=running, waiting_requests=0, computed_tokens=100 + 10 * second)
        sampler.note(start, load, 500 + second, float(second))
    counts = sampler.of(start)
    assert (counts.sampled_s, counts.busy_s, counts.stream_s) == (4.0, 2.0, 4.0)
    assert (counts.computed_tokens, counts.emitted_tokens) == (40, 4)
    sampler.note(start, EngineLoad(running_requests=1), None, 1_000.0)
    assert sampler.of(start).sampled_s == 9.0
    sampler.keep(())
    assert sampler.of(start) == Counts()
