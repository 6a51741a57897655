"""A batch from its creation to its files, with an endpoint that follows a script; processes end at any point of it."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.batches.gate import RowGate
from tandem_frontend.batches.journal import Journal
from tandem_frontend.batches.records import WINDOW_S, Batch, Status
from tandem_frontend.batches.rows import ATTEMPTS_MAX, TENANT_PREFIX

from tandem.clock import monotonic
from tandem.domain.quota import Quota
from tandem.errors import Draining, InvalidRequest, LegFailed, NoWorkers, Overloaded, QuotaExceeded, RequestTooLarge
from tandem.testing.eventually import assert_eventually
from tests.unit.support.batch_scene import Scene, ScriptedEndpoint, hurry, names, rows

BODIES = [{"n": number} for number in range(20)]
ALL = [f"r{number}" for number in range(20)]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    hurry(monkeypatch)
    return Scene(tmp_path / "batches")


async def test_a_batch_runs_each_row_and_ends_with_its_results(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES), "alice", quota=Quota(requests_per_minute=5))
    async with scene.runner():
        ended = await scene.until(batch)
    assert (ended.status, ended.total, ended.completed, ended.failed) == (Status.COMPLETED, 20, 20, 0)
    assert ended.error_file_id is None
    lines = scene.output(batch)
    assert names(lines) == ALL
    assert [line["response"]["body"] for line in lines] == [{"answer": number} for number in range(20)]
    assert {line["response"]["status_code"] for line in lines} == {200}
    assert len({line["id"] for line in lines}) == 20
    caller = scene.endpoint.callers[0]
    assert (caller.tenant, caller.fairness_id, caller.is_background) == ("alice", TENANT_PREFIX + "alice", True)
    assert caller.quota == Quota(requests_per_minute=5)
    times = [ended.as_json()[f"{name}_at"] for name in ("in_progress", "finalizing", "completed")]
    assert times == [int(scene.clock())] * 3
    # What only running it needed is gone, at the latest with the next sweep.
    scene.store.sweep()
    assert sorted(path.name for path in scene.store.folder(batch).iterdir()) == ["batch.json"]


async def test_a_bad_line_fails_the_batch_before_any_row_runs(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES) + b"{\n" + rows({"n": 1}))
    async with scene.runner():
        ended = await scene.until(batch)
    assert ended.status is Status.FAILED
    assert [(error.code, error.line) for error in ended.errors] == [
        ("invalid_json_line", 21),
        ("duplicate_custom_id", 22),
    ]
    assert scene.endpoint.asked == []


async def test_a_row_that_its_endpoint_refuses_is_in_the_error_file(scene: Scene) -> None:
    scene.endpoint.failures = {
        1: [InvalidRequest("temperature", "must be at most 2")],
        2: [RequestTooLarge("body", "too large", limit=1)],
    }
    batch = scene.create(rows({"n": 0}, {"n": 1}, {"n": 2}, {"n": 3, "stream": True}))
    async with scene.runner():
        ended = await scene.until(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.COMPLETED, 1, 3)
    assert names(scene.output(batch)) == ["r0"]
    errors = scene.errors(batch)
    assert names(errors) == ["r1", "r2", "r3"]
    assert [line["response"]["status_code"] for line in errors] == [400, 413, 400]
    assert [line["response"]["body"]["error"]["param"] for line in errors] == ["temperature", "body", "stream"]


@pytest.mark.parametrize(
    "problem",
    [
        Overloaded("full", retry_delay_s=0.01),
        QuotaExceeded("used up", retry_delay_s=0.01),
        Draining("stopping"),
        NoWorkers("none"),
    ],
)
async def test_a_row_without_capacity_runs_again_until_it_has_some(scene: Scene, problem: Exception) -> None:
    scene.endpoint.failures = {1: [problem] * 3}
    batch = scene.create(rows({"n": 0}, {"n": 1}, {"n": 2}))
    async with scene.runner():
        ended = await scene.until(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.COMPLETED, 3, 0)
    assert scene.outcomes["repeated"] == 3


async def test_a_row_that_fails_on_the_workers_again_and_again_ends(scene: Scene) -> None:
    scene.endpoint.failures = {1: [LegFailed("a worker died")] * 9, 2: [ValueError("private")] * 9}
    batch = scene.create(rows({"n": 0}, {"n": 1}, {"n": 2}))
    async with scene.runner():
        ended = await scene.until(batch)
    assert (ended.completed, ended.failed) == (1, 2)
    assert [line["response"]["status_code"] for line in scene.errors(batch)] == [503, 500]
    assert sum(body["n"] == 1 for body in scene.endpoint.asked) == ATTEMPTS_MAX
    assert "private" not in str(scene.errors(batch))


async def test_a_batch_goes_on_where_a_process_that_ended_has_left_it(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES))
    scene.endpoint.held = lambda body: body["n"] >= 12
    async with scene.runner():
        await assert_eventually(lambda: scene.outcomes["completed"] == 12)
    second = ScriptedEndpoint()
    async with scene.runner(second):
        ended = await scene.until(batch)
    assert (ended.status, ended.completed) == (Status.COMPLETED, 20)
    assert names(scene.output(batch)) == ALL
    assert sorted(body["n"] for body in second.asked) == list(range(12, 20))


async def test_a_second_process_waits_until_the_first_has_ended(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES))
    scene.endpoint.held = lambda body: True
    second = ScriptedEndpoint()
    async with scene.runner(second) as waiting:
        await assert_eventually(lambda: waiting.is_leading)
        async with scene.runner() as other:
            await scene.until(batch)
            assert not other.is_leading
    assert scene.endpoint.asked == []


def has_come_so_far(scene: Scene, batch: Batch, completed: int) -> bool:
    return scene.outcomes["completed"] >= completed or scene.now(batch).has_ended


@pytest.mark.parametrize("seed", range(4))
async def test_each_row_is_once_in_the_files_however_often_processes_end(scene: Scene, seed: int) -> None:
    batch = scene.create(rows(*BODIES))
    for stop in range(1, 6):
        # Ends at another point each time, also while the files are made.
        async with scene.runner():
            await assert_eventually(partial(has_come_so_far, scene, batch, 3 * stop + seed))
    async with scene.runner():
        await scene.until(batch)
    assert names(scene.output(batch)) == ALL
    assert scene.errors(batch) == []


async def test_results_that_a_loss_of_power_has_taken_are_computed_again(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES))
    started = batch.entering(Status.IN_PROGRESS, scene.clock(), total=20, completed=20)
    scene.store.write(started.entering(Status.FINALIZING, scene.clock()))
    journal = Journal(scene.store.folder(batch))
    journal.append(0, b'{"custom_id":"r0"}', is_error=False)
    journal.close()
    async with scene.runner():
        await scene.until(batch)
    assert names(scene.output(batch)) == ALL
    assert len(scene.endpoint.asked) == 19


async def test_results_that_are_lost_before_the_end_are_computed_again(scene: Scene) -> None:
    scene.endpoint.held = lambda body: body["n"] == 19
    batch = scene.create(rows(*BODIES))
    async with scene.runner():
        await assert_eventually(lambda: scene.outcomes["completed"] == 19)
        for journal in scene.store.folder(batch).glob("journal-*"):
            os.truncate(journal, 0)
        scene.endpoint.release.set()
        ended = await scene.until(batch)
    assert (ended.status, ended.completed) == (Status.COMPLETED, 20)
    assert names(scene.output(batch)) == ALL


async def test_a_cancelled_batch_keeps_what_has_ended(scene: Scene) -> None:
    scene.endpoint.held = lambda body: body["n"] >= 5
    batch = scene.create(rows(*BODIES))
    async with scene.runner():
        await assert_eventually(lambda: scene.outcomes["completed"] == 5)
        scene.store.cancel("", batch.id)
        ended = await scene.until(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.CANCELLED, 5, 15)
    assert ended.as_json()["cancelled_at"] is not None
    assert names(scene.output(batch)) == ALL[:5]
    assert names(scene.errors(batch)) == ALL[5:]
    assert {line["error"]["code"] for line in scene.errors(batch)} == {"batch_cancelled"}
    # Rows that ran were aborted.
    assert scene.endpoint.running == 0
    assert sum(scene.endpoint.cancelled.values()) > 0


async def test_a_batch_that_another_process_has_ended_is_not_changed(scene: Scene) -> None:
    """As on a file system whose locks do not hold."""
    scene.endpoint.held = lambda body: True
    batch = scene.create(rows(*BODIES))
    async with scene.runner() as runner:
        await assert_eventually(lambda: scene.endpoint.running > 0)
        ended = scene.now(batch).entering(Status.FINALIZING, 1).entering(Status.COMPLETED, 2, completed=20)
        scene.store.write(ended)
        await assert_eventually(lambda: runner.open_count == 0)
        assert scene.endpoint.running == 0
    assert scene.now(batch) == ended


async def test_a_batch_that_was_cancelled_before_it_began_runs_nothing(scene: Scene) -> None:
    batch = scene.create(rows(*BODIES))
    scene.store.cancel("", batch.id)
    async with scene.runner():
        assert (await scene.until(batch)).status is Status.CANCELLED
    assert scene.endpoint.asked == []


async def test_a_batch_expires_at_the_end_of_its_window(scene: Scene) -> None:
    scene.endpoint.held = lambda body: body["n"] >= 5
    batch = scene.create(rows(*BODIES))
    async with scene.runner():
        await assert_eventually(lambda: scene.outcomes["completed"] == 5)
        scene.clock.advance(WINDOW_S - 1)
        read_count = scene.clock.read_count
        await assert_eventually(lambda: scene.clock.read_count > read_count + 3)
        assert scene.now(batch).status is Status.IN_PROGRESS
        scene.clock.advance(1)
        ended = await scene.until(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.EXPIRED, 5, 15)
    assert names(scene.output(batch)) == ALL[:5]
    assert {line["error"]["code"] for line in scene.errors(batch)} == {"batch_expired"}
    assert names(scene.errors(batch)) == ALL[5:]


async def test_a_batch_expires_while_an_earlier_one_of_its_tenant_runs(scene: Scene) -> None:
    scene.endpoint.held = lambda body: True
    scene.create(rows(*BODIES))
    scene.clock.advance(-100)
    later = scene.create(rows(*BODIES))
    async with scene.runner():
        await scene.until(later, Status.IN_PROGRESS)
        scene.clock.advance(WINDOW_S)
        assert (await scene.until(later)).status is Status.EXPIRED


async def test_places_go_to_batches_in_turn() -> None:
    gate = RowGate(BackgroundShare(2, 0.1, monotonic), lambda: True)
    order: list[str] = []

    async def run(name: str) -> None:
        for _ in range(10):
            await gate.turn()
            order.append(name)
            gate.start(asyncio.create_task(asyncio.sleep(0)), 0)

    await asyncio.gather(run("alice"), run("bob"))
    # The first two places were free when only one had asked.
    assert [order[2:12].count(name) for name in ("alice", "bob")] == [5, 5]
    await assert_eventually(lambda: gate.running_count == 0)


async def test_live_requests_stop_rows_which_run_again_later(scene: Scene) -> None:
    scene.endpoint.held = lambda body: True
    batch = scene.create(rows(*BODIES))
    async with scene.runner():
        await assert_eventually(lambda: scene.endpoint.running == 8)
        scene.share.note_live(1)
        await assert_eventually(lambda: scene.endpoint.running == 1)
        scene.endpoint.release.set()
        scene.share.note_live(0)
        ended = await scene.until(batch)
    assert scene.outcomes["stopped"] == 7
    assert (ended.completed, ended.failed) == (20, 0)
    assert names(scene.output(batch)) == ALL


async def test_the_row_that_was_stopped_before_is_the_one_that_stays(scene: Scene) -> None:
    scene.share.most = 2
    scene.endpoint.held = lambda body: True
    batch = scene.create(rows({"n": 0}, {"n": 1}))
    async with scene.runner():
        await assert_eventually(lambda: scene.endpoint.running == 2)
        scene.share.note_live(1)
        await assert_eventually(lambda: scene.endpoint.cancelled.total() == 1)
        (stopped,) = scene.endpoint.cancelled
        scene.share.note_live(0)
        await assert_eventually(lambda: scene.endpoint.running == 2)
        scene.share.note_live(1)
        await assert_eventually(lambda: scene.endpoint.cancelled.total() == 2)
        assert scene.endpoint.cancelled[stopped] == 1
        scene.endpoint.release.set()
        scene.share.note_live(0)
        await scene.until(batch)


async def test_a_lack_of_capacity_pauses_the_batch_without_reading_it_all(scene: Scene) -> None:
    scene.endpoint.failures = {number: [Overloaded("full", retry_delay_s=3_600)] for number in range(20)}
    scene.create(rows(*BODIES))
    async with scene.runner():
        await assert_eventually(lambda: scene.outcomes["repeated"] >= 9)
        await assert_eventually(lambda: scene.endpoint.running == 0)
        # Eight that ran, as many that had their turn before the pause was known, and one that waited for its turn.
        assert len(scene.endpoint.asked) <= 17
