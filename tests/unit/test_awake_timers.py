"""Timers on the time in which the loop ran: its own lag does not count as a peer's silence."""

from __future__ import annotations

import asyncio

import pytest

from tandem.service.awake_timers import TICK_MAX_S, TICK_S, AwakeTimers
from tandem.testing.virtual_time import run_virtually


def block(seconds: float) -> None:
    """The loop stands still: on virtual time, its clock jumps in the middle of a turn."""
    loop = asyncio.get_running_loop()
    loop._now_s += seconds  # type: ignore[attr-defined]


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_a_timer_comes_once_after_its_time() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.after(1.0, lambda: came.append(now_s()))
        await asyncio.sleep(3)
        assert len(came) == 1
        assert 1.0 <= came[0] <= 1.0 + 2 * TICK_S

    run_virtually(live())


def test_a_cancelled_timer_never_comes() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timer = timers.after(0.5, lambda: came.append(now_s()))
        deadline = timers.at(now_s() + 0.5, lambda: came.append(now_s()))
        timer.cancel()
        deadline.cancel()
        await asyncio.sleep(2)
        assert not came
        assert timers._ticker is None, "nothing ticks while there is no timer"

    run_virtually(live())


def test_time_in_which_the_loop_stood_still_does_not_count() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.after(1.0, lambda: came.append(now_s()))
        await asyncio.sleep(0.5)
        block(10.0)
        await asyncio.sleep(0.3)
        assert not came, "10 s passed in which nothing could be read"
        await asyncio.sleep(1.0)
        assert came
        assert came[0] >= 11.0 - 2 * TICK_MAX_S

    run_virtually(live())


def test_a_loop_that_always_lags_counts_a_part_of_its_time() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.after(1.0, lambda: came.append(now_s()))
        while not came:
            block(0.3)
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        assert came[0] > 2.5

    run_virtually(live())


def test_a_deadline_keeps_to_the_clock_and_waits_for_a_punctual_loop() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.at(now_s() + 1.0, lambda: came.append(now_s()))
        await asyncio.sleep(0.5)
        block(5.0)
        await asyncio.sleep(0)
        assert not came, "what had arrived by then has not been read"
        await asyncio.sleep(0.2)
        assert came
        assert 5.5 < came[0] < 5.8

    run_virtually(live())


def test_a_timer_that_fails_stops_no_other() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.after(0.1, lambda: 1 / 0)  # type: ignore[arg-type]
        timers.after(0.1, lambda: came.append(now_s()))
        timers.after(0.3, lambda: came.append(now_s()))
        await asyncio.sleep(1)
        assert len(came) == 2

    run_virtually(live())


def test_timers_set_in_a_callback_come_too() -> None:
    async def live() -> None:
        timers, count = AwakeTimers(), 0

        def again() -> None:
            nonlocal count
            count += 1
            if count < 5:
                timers.after(0.2, again)

        timers.after(0.2, again)
        await asyncio.sleep(3)
        assert count == 5

    run_virtually(live())


def test_a_deadline_is_judged_also_by_a_loop_that_always_lags() -> None:
    async def live() -> None:
        timers, came = AwakeTimers(), list[float]()
        timers.at(now_s() + 1.0, lambda: came.append(now_s()))
        for _ in range(20):
            block(0.3)
            await asyncio.sleep(0.06)
        assert came
        assert 1.0 < came[0] < 2.0

    run_virtually(live())


def test_a_timeout_counts_time_in_which_the_loop_ran() -> None:
    async def live() -> None:
        timers = AwakeTimers()
        async with timers.within(1.0):
            await asyncio.sleep(0.5)
            block(5.0)
            await asyncio.sleep(0.3)
        begin_s = now_s()
        with pytest.raises(TimeoutError):
            async with timers.within(1.0):
                await asyncio.sleep(10)
        assert 1.0 <= now_s() - begin_s <= 1.0 + 2 * TICK_S
        await asyncio.sleep(1)
        assert timers._ticker is None, "nothing is left of it"

    run_virtually(live())
