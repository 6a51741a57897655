"""Turns before long texts are encoded: in order, so many at a time, and a caller that leaves makes room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.preparation.encoding.turns import Turns


class Jobs:
    """Jobs that end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._ends: dict[int, asyncio.Future[int]] = {}

    def __call__(self, number: int) -> Callable[[], Coroutine[None, None, int]]:
        async def job() -> int:
            self.begun.append(number)
            self._ends[number] = asyncio.get_running_loop().create_future()
            return await self._ends[number]

        return job

    def end(self, number: int, problem: Exception | None = None) -> None:
        if problem is None:
            self._ends.pop(number).set_result(number)
        else:
            self._ends.pop(number).set_exception(problem)

    @property
    def running(self) -> list[int]:
        return sorted(self._ends)


async def settle() -> None:
    """Until everything has happened that does not wait for the test."""
    for _ in range(10):
        await asyncio.sleep(0)


async def start(turns: Turns, jobs: Jobs, count: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(turns.run(jobs(number))) for number in range(count)]
    await settle()
    return tasks


async def test_so_many_at_a_time_and_the_others_in_order() -> None:
    turns, jobs = Turns(2), Jobs()
    tasks = await start(turns, jobs, 5)
    assert (jobs.begun, turns.running_count, turns.waiting_count) == ([0, 1], 2, 3)
    for ended, begun in ((1, [0, 1, 2]), (0, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 4])):
        jobs.end(ended)
        await settle()
        assert jobs.begun == begun
    jobs.end(2)
    jobs.end(4)
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
    assert (turns.running_count, turns.waiting_count) == (0, 0)


async def test_a_caller_that_leaves_while_it_waits_gives_its_turn_back() -> None:
    turns, jobs = Turns(1), Jobs()
    tasks = await start(turns, jobs, 4)
    tasks[1].cancel()
    await settle()
    assert turns.waiting_count == 2
    jobs.end(0)
    await settle()
    assert jobs.begun == [0, 2]
    await finish(turns, jobs, tasks)


async def test_a_caller_that_leaves_as_its_turn_comes_gives_it_back_too() -> None:
    turns, jobs = Turns(1), Jobs()
    tasks = await start(turns, jobs, 3)
    jobs.end(0)
    # The first waits for the end of its job, and the second has not been woken when it is cancelled.
    for _ in range(10):
        await asyncio.sleep(0)
        if turns.waiting_count == 1:
            break
    tasks[1].cancel()
    await settle()
    assert jobs.begun == [0, 2]
    assert tasks[1].cancelled()
    await finish(turns, jobs, tasks)


async def test_a_job_that_was_left_keeps_its_turn_to_its_end() -> None:
    turns, jobs = Turns(1), Jobs()
    tasks = await start(turns, jobs, 2)
    tasks[0].cancel()
    await settle()
    assert tasks[0].cancelled()
    assert jobs.begun == [0], "what it does in a thread goes on"
    jobs.end(0, RuntimeError("unread"))
    await settle()
    assert jobs.begun == [0, 1]
    await finish(turns, jobs, tasks)


async def test_a_failure_is_its_callers_only() -> None:
    turns, jobs = Turns(1), Jobs()
    tasks = await start(turns, jobs, 2)
    jobs.end(0, RuntimeError("broken"))
    await settle()
    jobs.end(1)
    with pytest.raises(RuntimeError, match="broken"):
        await tasks[0]
    assert await tasks[1] == 1


async def test_idle_is_when_the_last_has_ended() -> None:
    turns, jobs = Turns(1), Jobs()
    await turns.wait_idle()
    tasks = await start(turns, jobs, 2)
    idle = asyncio.create_task(turns.wait_idle())
    jobs.end(0)
    await settle()
    assert not idle.done()
    jobs.end(1)
    await idle
    assert [task.done() for task in tasks] == [True, True]


@given(width=st.integers(1, 3), steps=st.lists(st.tuples(st.sampled_from(["come", "leave", "end"]), st.integers(0, 9))))
@settings(deadline=None)
async def test_no_turn_is_lost_as_callers_come_and_leave(width: int, steps: list[tuple[str, int]]) -> None:
    turns, jobs, tasks = Turns(width), Jobs(), list[asyncio.Task[int]]()
    for step, which in steps:
        if step == "come":
            tasks.append(asyncio.create_task(turns.run(jobs(len(tasks)))))
        elif step == "leave" and tasks:
            tasks[which % len(tasks)].cancel()
        elif step == "end" and jobs.running:
            jobs.end(jobs.running[which % len(jobs.running)])
        if which % 3:
            await settle()
            assert len(jobs.running) <= width
            assert turns.waiting_count == 0 or len(jobs.running) == width
            assert jobs.begun == sorted(jobs.begun)
    await finish(turns, jobs, tasks)
    tasks = await start(turns, jobs, width)
    assert len(jobs.running) == width
    await finish(turns, jobs, tasks)


async def finish(turns: Turns, jobs: Jobs, tasks: list[asyncio.Task[int]]) -> None:
    """Let everything come to its end."""
    await settle()
    while jobs.running:
        for number in jobs.running:
            jobs.end(number)
        await settle()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (turns.running_count, turns.waiting_count) == (0, 0)
