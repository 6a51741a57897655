"""The role changes that a plan needs: the fewest ones, never the last worker of a role, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cli import plan_apply
from tandem.cli.plan_apply import Step, apply_plan, role_steps
from tandem.domain.recorded_load import RecordedCluster
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import ConfigError, RoleChangeRefused, StartError
from tests.unit.support.examples import examples
from tests.wire.support.registry_host import make_worker

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED
EVERY = frozenset(WorkerRole)


def workers(**counts: int) -> list[Worker]:
    return [
        replace(make_worker(f"{role.value}-{number}"), role=role)
        for role in WorkerRole
        for number in range(counts.get(role.value, 0))
    ]


def takes(some: list[Worker], roles: frozenset[WorkerRole] = EVERY) -> dict[str, frozenset[WorkerRole]]:
    return {one.worker_id: roles for one in some}


def texts(steps: list[Step]) -> list[str]:
    return [str(step) for step in steps]


def test_a_worker_that_the_plan_does_not_need_takes_the_missing_role() -> None:
    some = workers(prefill=1, decode=3)
    assert texts(role_steps(some, {PREFILL: 2, DECODE: 2}, takes(some))) == ["decode-2: decode -> prefill"]


def test_a_plan_of_fewer_workers_leaves_the_others_in_their_roles() -> None:
    some = workers(prefill=3, decode=3)
    assert role_steps(some, {PREFILL: 1, DECODE: 2}, takes(some)) == []


def test_a_plan_of_more_workers_says_how_many_are_missing() -> None:
    some = workers(prefill=1, decode=1)
    with pytest.raises(
        StartError, match=r"needs 3 workers \(2 prefill \+ 1 decode\), and 2 serve.* Start 1 more first"
    ):
        role_steps(some, {PREFILL: 2, DECODE: 1, AGGREGATED: 0}, takes(some))


def test_a_worker_that_may_not_take_the_role_is_named() -> None:
    some = workers(prefill=1, decode=2)
    with pytest.raises(StartError, match="none of decode-1, decode-0 may take that role"):
        role_steps(some, {PREFILL: 2, DECODE: 1}, takes(some, frozenset({DECODE})))
    mixed = takes(some) | {"decode-1": frozenset({DECODE})}
    assert texts(role_steps(some, {PREFILL: 2, DECODE: 1}, mixed)) == ["decode-0: decode -> prefill"]


def test_the_last_worker_of_a_role_keeps_it() -> None:
    some = workers(prefill=1, decode=1)
    with pytest.raises(StartError, match="the last worker of a role keeps it"):
        role_steps(some, {AGGREGATED: 2}, takes(some))


@settings(max_examples=examples(200))
@given(st.tuples(*[st.integers(0, 5)] * 3), st.tuples(*[st.integers(0, 5)] * 3))
def test_steps_reach_the_plan_and_never_empty_a_role(have: tuple[int, int, int], want: tuple[int, int, int]) -> None:
    some = workers(**dict(zip((role.value for role in WorkerRole), have, strict=True)))
    wanted = dict(zip(WorkerRole, want, strict=True))
    try:
        steps = role_steps(some, wanted, takes(some))
    except StartError:
        return
    now = {role: sum(one.role is role for one in some) for role in WorkerRole}
    for step in steps:
        now[step.worker.role] -= 1
        now[step.role] += 1
        assert now[step.worker.role] >= 1
    assert all(now[role] >= wanted[role] for role in WorkerRole)
    assert len({step.worker.worker_id for step in steps}) == len(steps)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is changed, without a cluster; the second change fails."""
    changes: list[str] = []

    async def roles_of(channels: Any, address: str) -> frozenset[WorkerRole]:
        return EVERY

    async def change_one(worker_id: str, role: WorkerRole, registries: Any, **more: Any) -> int:
        if len(changes) == 1:
            raise RoleChangeRefused("it is leaving", worker=worker_id)
        changes.append(worker_id)
        return 0

    monkeypatch.setattr(plan_apply, "roles_of", roles_of)
    monkeypatch.setattr(plan_apply, "change_one", change_one)
    return changes


def recorded(**counts: int) -> RecordedCluster:
    return cast("RecordedCluster", SimpleNamespace(workers=tuple(workers(**counts))))


async def test_the_first_failure_stops_and_what_was_made_is_said(
    made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {PREFILL: 4, DECODE: 1}
    assert await apply_plan(wanted, recorded(prefill=1, decode=4), "127.0.0.1:1", None, is_agreed=True) == 1
    out = capsys.readouterr().out
    assert made == ["decode-3"]
    assert "stopped at decode-2: decode -> prefill: it is leaving" in out
    assert "made before: decode-3: decode -> prefill; not tried: 1" in out


async def test_without_a_terminal_and_without_yes_nothing_is_changed(
    made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="yes: is required without a terminal to ask on"):
        await apply_plan({PREFILL: 2, DECODE: 1}, recorded(prefill=1, decode=2), "127.0.0.1:1", None, is_agreed=False)
    assert not made
    assert "decode-1: decode -> prefill" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "status", "count"), [("y", 0, 1), ("n", 1, 0), ("", 1, 0)])
async def test_the_answer_decides(
    made: list[str], monkeypatch: pytest.MonkeyPatch, answer: str, status: int, count: int
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    wanted, cluster = {PREFILL: 2, DECODE: 1}, recorded(prefill=1, decode=2)
    assert await apply_plan(wanted, cluster, "127.0.0.1:1", None, is_agreed=False) == status
    assert len(made) == count
