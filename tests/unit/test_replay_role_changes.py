"""Roles that change during a replay: no request is lost, the controller follows the load, and a schedule is kept."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from tandem_frontend.replay.frontend import FINISHED
from tandem_frontend.replay.role_changes import ControllerSteering, ScheduledSteering
from tandem_frontend.replay.simulation import Replay, replay

from benchmarks.replay.role_controller import Scenario, controlled, fleet_of, planned, played, ramp, trace_of
from tandem.controller.rule import RoleRule
from tandem.controller.settings import rule_settings
from tandem.domain.worker import WorkerRole

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
FLIP_S, END_S = 60.0, 150.0


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """A small flip: four workers, long prompts, then long answers."""
    rng, at_s = random.Random(3), 0.0
    requests = []
    while at_s < END_S:
        prompt, answer = (8_000, 50) if at_s < FLIP_S else (500, 1_500)
        requests.append((at_s, prompt, answer))
        at_s += rng.expovariate(6.0)
    return Scenario(
        requests=tuple(requests),
        ttft_s=2.0,
        itl_s=0.015,
        workers=4,
        starts=(3,),
        planned=((0.0, 3), (FLIP_S, 1)),
        flip_s=FLIP_S,
    )


@pytest.fixture(scope="module")
def done(scenario: Scenario) -> Replay:
    fleet = fleet_of((2, 2, 0))
    steering = ControllerSteering(rule_settings(ttft_s=scenario.ttft_s, itl_s=scenario.itl_s))
    return replay(fleet, fleet.options(), trace_of(scenario), "auto", 1, steering=steering)


def test_no_request_fails_and_each_keeps_its_length(scenario: Scenario, done: Replay) -> None:
    assert len(done.served) == len(scenario.requests)
    for asked, one in zip(scenario.requests, done.served, strict=True):
        assert one.outcome == FINISHED
        assert (one.prompt_tokens, one.answer_tokens) == asked[1:]


def test_the_controller_turns_once_with_the_load(done: Replay) -> None:
    before = [one.role for one in done.role_changes if one.begin_s < FLIP_S]
    after = [one.role for one in done.role_changes if one.begin_s >= FLIP_S]
    assert set(before) == {PREFILL}
    assert set(after) == {DECODE}
    assert all(later.begin_s >= one.end_s for one, later in itertools.pairwise(done.role_changes))
    for one in done.role_changes:
        assert f"{one.worker_id} takes the role {one.role.value}: needs " in one.words


def test_a_worker_changes_once_its_last_answer_has_ended(done: Replay) -> None:
    drained = 0
    for change in done.role_changes:
        if change.role is PREFILL:
            ends = [
                one.end_s for one in done.served if one.decode == change.worker_id and one.arrival_s < change.begin_s
            ]
            assert all(end_s <= change.end_s for end_s in ends)
            drained += sum(end_s > change.begin_s for end_s in ends)
    assert drained > 0


def test_a_worker_in_its_new_role_serves_and_the_former_start_does_not(done: Replay) -> None:
    starts = {engine.worker.start: engine for engine in done.engines}
    for (worker_id, epoch), engine in starts.items():
        assert engine.is_idle
        assert engine.has_left is ((worker_id, epoch + 1) in starts)
    assert all(engine.figures.busy_s > 0 for engine in done.engines if engine.worker.epoch > 1)


def test_the_same_seed_gives_the_same_changes(scenario: Scenario, done: Replay) -> None:
    again = controlled(scenario, 2, 1)
    assert again.changes == done.role_changes


def test_the_controller_beats_the_static_fleets_of_each_half(scenario: Scenario) -> None:
    with_controller = controlled(scenario, 3, 1)
    fixed = [played(scenario, (prefill, 4 - prefill, 0), 1, "static") for prefill in (2, 3)]
    assert with_controller.within >= 1.3 * max(one.within for one in fixed)
    assert with_controller.failed == 0
    assert planned(scenario, 1).within >= with_controller.within


def test_a_schedule_is_kept(scenario: Scenario) -> None:
    fleet = fleet_of((3, 1, 0))
    steering = ScheduledSteering(((20.0, 1), (40.0, 2)))
    short = replace(scenario, requests=scenario.requests[:300])
    done = replay(fleet, fleet.options(), trace_of(short), "auto", 1, steering=steering)
    assert [one.role for one in done.role_changes] == [DECODE, DECODE, PREFILL]
    assert [one.begin_s for one in done.role_changes] == pytest.approx([20.0, 20.0, 40.0])


def test_the_replay_runs_the_process_own_rule() -> None:
    assert isinstance(ControllerSteering(rule_settings(ttft_s=2, itl_s=0.1))._rule, RoleRule)


def test_the_ramp_rises_and_falls_once() -> None:
    times = [at_s for at_s, _, _ in ramp(1).requests]
    counts = [sum(begin <= at_s < begin + 150 for at_s in times) for begin in range(0, 900, 150)]
    assert counts[0] < counts[1] < counts[2]
    assert counts[3] > counts[4] > counts[5]
