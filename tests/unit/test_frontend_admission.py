"""Places with the workers: how many there are, who gets the next, and what becomes of those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from frontend_workers import decode
from tandem_frontend.admission import Admission
from tandem_frontend.capacity import Capacity
from tandem_frontend.loop_load import MEASURE_S, LoopLoad
from tandem_frontend.waiting_line import Demand

from tandem.engine.simulated.virtual_time import run_virtually
from tandem.errors import DeadlinePassed, Draining, Overloaded
from tandem.runtime.clock import ManualClock, monotonic
from tandem.testing.eventually import assert_eventually

ONE = Demand(tokens=10)


class Fixed:
    """Room for so many requests."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max
        self.asked_count = 0

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        self.asked_count += 1
        return held_requests < self.requests_max


def admission(open_requests_max: int = 100, requests_max: int = 1) -> Admission:
    return Admission(open_requests_max, Fixed(requests_max), monotonic)


async def served(places: Admission, demand: Demand, order: list[str], name: str, hold_s: float = 0.0) -> None:
    with places.admit():
        async with places.place(demand):
            order.append(name)
            await asyncio.sleep(hold_s)


async def test_places_are_given_back_however_a_request_ends() -> None:
    places = admission(1)
    with contextlib.suppress(ValueError), places.admit():
        async with places.place(ONE):
            raise ValueError
    with places.admit():
        assert places.open_count == 1
        with pytest.raises(Overloaded) as refused, places.admit():
            pass
        assert refused.value.retry_delay_s is not None
        async with places.place(ONE):
            pass
    assert places.open_count == 0


async def test_answers_that_are_not_read_count_as_open() -> None:
    unread = 1
    places = Admission(2, Fixed(1), monotonic, unread_count=lambda: unread)
    with places.admit():
        assert places.open_count == 2
        with pytest.raises(Overloaded, match="2 requests are open"), places.admit():
            pass
        unread = 0
        with places.admit():
            pass


def test_a_process_that_is_late_refuses_newcomers_and_goes_on_with_the_others() -> None:
    async def live() -> None:
        loop, load = asyncio.get_running_loop(), LoopLoad(thread_time=lambda: 0.0)
        places = Admission(100, Fixed(100), monotonic, load, lag_max_s=1.0)
        with places.admit():
            for _ in range(3):
                with places.admit():
                    pass
                await asyncio.sleep(2 * MEASURE_S)
            await asyncio.sleep(MEASURE_S / 2)
            loop._now_s += 30.0  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
            with places.admit():
                assert places.open_count == 2, "it stood still once, and is not late any more"
            for _ in range(6):
                await asyncio.sleep(MEASURE_S / 2)
                loop._now_s += 3.0  # type: ignore[attr-defined]
            with pytest.raises(Overloaded, match=r"[23]\.\d s late") as refused, places.admit():
                pass
            assert refused.value.retry_delay_s is not None
            assert places.open_count == 1
            for _ in range(6):
                await asyncio.sleep(2 * MEASURE_S)
            with places.admit():
                assert places.open_count == 2

    run_virtually(live())


async def test_a_closed_door_lets_those_inside_and_in_line_finish() -> None:
    places, order = admission(), list[str]()
    first = asyncio.create_task(served(places, ONE, order, "inside", 0.05))
    second = asyncio.create_task(served(places, ONE, order, "in line"))
    await asyncio.sleep(0.01)
    assert (places.open_count, places.waiting_count) == (2, 1)
    places.close()
    with pytest.raises(Draining), places.admit():
        pass
    await asyncio.wait_for(places.wait_none(), 1)
    await asyncio.gather(first, second)
    assert order == ["inside", "in line"]


async def test_who_waits_is_let_in_by_priority() -> None:
    places, order = admission(), list[str]()
    holding = asyncio.create_task(served(places, ONE, order, "holds", 0.02))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(served(places, Demand(tokens=10, priority=priority), order, str(priority)))
        for priority in (0, 2, 1)
    ]
    await asyncio.gather(holding, *tasks)
    assert order == ["holds", "2", "1", "0"]


async def test_who_leaves_the_line_costs_nobody_a_place() -> None:
    places, order = admission(), list[str]()
    holding = asyncio.create_task(served(places, ONE, order, "holds", 0.05))
    await asyncio.sleep(0)
    gone = asyncio.create_task(served(places, ONE, order, "gone"))
    stays = asyncio.create_task(served(places, ONE, order, "stays"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(holding, stays)
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert order == ["holds", "stays"]
    assert (places.open_count, places.waiting_count) == (0, 0)


async def test_who_is_cancelled_at_the_moment_of_his_turn_gives_it_on() -> None:
    places = admission()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(places.place(ONE))
        gone = asyncio.create_task(places.place(ONE).__aenter__())
        stays = asyncio.create_task(places.place(ONE).__aenter__())
        await asyncio.sleep(0)
        await stack.aclose()
        gone.cancel()
        await asyncio.wait_for(stays, 1)
    assert gone.cancelled()


async def test_a_deadline_that_passes_in_line_is_told_as_such() -> None:
    places = admission()
    async with places.place(ONE):
        with pytest.raises(DeadlinePassed):
            async with places.place(Demand(tokens=10, deadline_s=monotonic() + 0.05)):
                pass
    assert places.waiting_count == 0


async def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once() -> None:
    clock = ManualClock(0.0)
    places = Admission(100, Fixed(1), clock)
    for _ in range(4):
        async with places.place(Demand(tokens=100)):
            clock.advance(1.0)
    # Some 130 tokens a second, and 400 of the same tenant are waiting, all of them more urgent.
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(places.place(ONE))
        demand = Demand(tokens=100, deadline_s=6.9)
        waiting = [asyncio.create_task(places.place(demand).__aenter__()) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="deadline") as refused:
            async with places.place(Demand(tokens=100, deadline_s=7.0)):
                pass
        assert refused.value.retry_delay_s is not None
        assert refused.value.retry_delay_s > 1.0
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_request_that_would_not_be_done_by_its_deadline_is_refused_at_once() -> None:
    """It would get its place in time, and an engine would work on it in vain."""
    clock = ManualClock(0.0)
    places = Admission(100, Fixed(1), clock)
    async with places.place(Demand(tokens=100)):
        clock.advance(2.0)
    async with places.place(ONE):
        with pytest.raises(Overloaded, match=r"itself 2\.0 s"):
            async with places.place(Demand(tokens=10, deadline_s=3.9)):
                pass
        longer = asyncio.create_task(places.place(Demand(tokens=10, deadline_s=4.1)).__aenter__())
        await asyncio.sleep(0)
        assert places.waiting_count == 1
        longer.cancel()
        await asyncio.wait({longer})


async def test_a_newcomer_does_not_push_others_beyond_their_deadlines() -> None:
    clock = ManualClock(0.0)
    places = Admission(100, Fixed(1), clock)
    for _ in range(4):
        async with places.place(Demand(tokens=100)):
            clock.advance(1.0)
    async with places.place(ONE):
        # A hundred tokens a second: it has its place in no time, its end after one second.
        waits = asyncio.create_task(places.place(Demand(tokens=100, deadline_s=6.0)).__aenter__())
        await asyncio.sleep(0)
        urgent = Demand(tokens=150, deadline_s=5.9)
        with pytest.raises(Overloaded, match="that wait already"):
            async with places.place(urgent):
                pass
        small = asyncio.create_task(places.place(replace(urgent, tokens=10)).__aenter__())
        await asyncio.sleep(0)
        before_all = asyncio.create_task(places.place(replace(urgent, priority=1)).__aenter__())
        await asyncio.sleep(0)
        assert places.waiting_count == 3, "a higher priority goes first, and a small one pushes nobody too far"
        for task in (waits, before_all, small):
            task.cancel()
        await asyncio.wait({waits, before_all, small})


@pytest.mark.parametrize("others", [0, 1])
async def test_nobody_is_worked_for_who_will_have_gone_while_others_wait(others: int) -> None:
    clock = ManualClock(0.0)
    room = Fixed(1)
    places = Admission(100, room, clock)
    async with places.place(Demand(tokens=100)):
        clock.advance(2.0)
    holding = places.place(ONE)
    await holding.__aenter__()
    late = asyncio.create_task(places.place(Demand(tokens=10, deadline_s=5.0)).__aenter__())
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(places.place(Demand(tokens=10)).__aenter__()) for _ in range(others)]
    await asyncio.sleep(0)
    clock.advance(1.5)
    room.requests_max = 2
    places.look_again()
    await asyncio.wait({late, *waiting}, timeout=1)
    assert late.done()
    assert (type(late.exception()) is Overloaded) is bool(others)
    assert all(task.done() and task.exception() is None for task in waiting), "his place went to nobody"
    assert places.waiting_count == 0


@pytest.mark.parametrize("tenants", [1, 50, 2_000])
async def test_a_refusal_is_quick_however_long_the_line_is(tenants: int) -> None:
    clock = ManualClock()
    places = Admission(10_000, Fixed(1), clock)
    async with places.place(ONE):
        clock.advance(1)
    async with places.place(ONE):
        waiting = [
            asyncio.create_task(places.place(Demand(tokens=10, tenant=str(number % tenants))).__aenter__())
            for number in range(2_000)
        ]
        await asyncio.sleep(0)
        assert places.waiting_count == 2_000
        begin_s = time.perf_counter()
        for _ in range(20):
            with pytest.raises(Overloaded):
                async with places.place(Demand(tokens=10, tenant="0", deadline_s=clock() + 0.5)):
                    pass
        assert (time.perf_counter() - begin_s) / 20 < 0.05
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_room_that_comes_is_given_to_the_line() -> None:
    room = Fixed(1)
    places, order = Admission(10, room, monotonic), list[str]()
    holding = asyncio.create_task(served(places, ONE, order, "holds", 0.1))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(served(places, ONE, order, "waits"))
    await asyncio.sleep(0.01)
    assert order == ["holds"]
    room.requests_max = 2
    places.look_again()
    await asyncio.wait_for(waiting, 0.05)
    await holding


async def test_what_changes_in_a_moment_is_looked_at_once() -> None:
    """A thousand workers that say their load must not make a frontend look at its line a thousand times."""
    room = Fixed(1)
    places, order = Admission(10, room, monotonic), list[str]()
    places.look_again_soon()
    assert places._look is None, "nothing waits"
    holding = asyncio.create_task(served(places, ONE, order, "holds", 10))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(served(places, ONE, order, "waits", 10)) for _ in range(2)]
    await asyncio.sleep(0)
    assert places.waiting_count == 2
    room.requests_max, room.asked_count = 2, 0
    for _ in range(1000):
        places.look_again_soon()
    assert room.asked_count == 0
    await assert_eventually(lambda: len(order), lambda count: count == 2)
    assert room.asked_count == 2, "the first in line fits, the second one does not"
    room.requests_max = 3
    places.look_again_soon()
    await assert_eventually(lambda: len(order), lambda count: count == 3)
    for task in (holding, *waiting):
        task.cancel()
    await asyncio.wait({holding, *waiting})


async def test_an_answer_without_a_bound_does_not_close_the_line() -> None:
    room = Capacity(decode().capabilities.model)
    room.follow((decode(), decode("decode-1")))
    places, order = Admission(10, room, monotonic), list[str]()
    endless = Demand(tokens=10 + 10**6, answer_tokens=10**6)
    tasks = [asyncio.create_task(served(places, endless, order, f"endless-{number}", 5)) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.wait_for(served(places, ONE, order, "small"), 1)
    assert sorted(order) == ["endless-0", "endless-1", "small"]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
