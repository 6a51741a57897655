"""Admission control: limits, the order of the queue, and requests that leave it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.prefill_backlog import UNMEASURED_PROMPTS_MAX, PrefillBacklog
from tandem_frontend.admission.queue import QueuedRequest

from tandem.clock import ManualClock, monotonic
from tandem.errors import DeadlinePassed, Draining, Overloaded
from tandem.service.loop_load import MEASURE_S, LoopLoad
from tandem.testing.eventually import assert_eventually
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.admission import admission_of
from tests.unit.support.frontend_workers import decode, prefill

ONE = QueuedRequest(tokens=10)


class Fixed:
    """Free capacity for a fixed number of requests."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max
        self.asked_count = 0

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        self.asked_count += 1
        return held_requests < self.requests_max


def admission(open_requests_max: int = 100, requests_max: int = 1) -> Admission:
    return admission_of(open_requests_max, Fixed(requests_max), monotonic)


async def served(
    controller: Admission, request: QueuedRequest, order: list[str], name: str, hold_s: float = 0.0
) -> None:
    with controller.admit():
        async with controller.slot(request):
            order.append(name)
            await asyncio.sleep(hold_s)


async def test_slots_are_released_however_a_request_ends() -> None:
    controller = admission(1)
    with contextlib.suppress(ValueError), controller.admit():
        async with controller.slot(ONE):
            raise ValueError
    with controller.admit():
        assert controller.open_count == 1
        with pytest.raises(Overloaded) as refused, controller.admit():
            pass
        assert refused.value.retry_delay_s is not None
        async with controller.slot(ONE):
            pass
    assert controller.open_count == 0


async def test_unread_responses_count_as_open() -> None:
    unread = {"": 1}
    admission = admission_of(2, Fixed(1), monotonic, unread=lambda: unread)
    with admission.admit():
        assert admission.requests.open_count == 2
        with pytest.raises(Overloaded, match="2 requests are open"), admission.admit():
            pass
        unread = {}
        with admission.admit():
            pass


def test_new_requests_are_rejected_while_the_event_loop_is_late() -> None:
    async def live() -> None:
        loop, load = asyncio.get_running_loop(), LoopLoad(thread_time=lambda: 0.0)
        controller = admission_of(100, Fixed(100), monotonic, load, lag_max_s=1.0)
        with controller.admit():
            for _ in range(3):
                with controller.admit():
                    pass
                await asyncio.sleep(2 * MEASURE_S)
            await asyncio.sleep(MEASURE_S / 2)
            loop._now_s += 30.0  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
            with controller.admit():
                assert controller.open_count == 2, "a single pause is no overload"
            for _ in range(6):
                await asyncio.sleep(MEASURE_S / 2)
                loop._now_s += 3.0  # type: ignore[attr-defined]
            with pytest.raises(Overloaded, match=r"[23]\.\d s late") as refused, controller.admit():
                pass
            assert refused.value.retry_delay_s is not None
            assert controller.open_count == 1
            for _ in range(6):
                await asyncio.sleep(2 * MEASURE_S)
            with controller.admit():
                assert controller.open_count == 2

    run_virtually(live())


async def test_close_rejects_new_requests_and_keeps_open_and_queued_ones() -> None:
    controller, order = admission(), list[str]()
    first = asyncio.create_task(served(controller, ONE, order, "open", 0.05))
    second = asyncio.create_task(served(controller, ONE, order, "queued"))
    await asyncio.sleep(0.01)
    assert (controller.open_count, controller.waiting_count) == (2, 1)
    controller.requests.close()
    with pytest.raises(Draining), controller.admit():
        pass
    await asyncio.wait_for(controller.wait_none(), 1)
    await asyncio.gather(first, second)
    assert order == ["open", "queued"]


async def test_queued_requests_start_by_priority() -> None:
    controller, order = admission(), list[str]()
    holding = asyncio.create_task(served(controller, ONE, order, "holds", 0.02))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(served(controller, QueuedRequest(tokens=10, priority=priority), order, str(priority)))
        for priority in (0, 2, 1)
    ]
    await asyncio.gather(holding, *tasks)
    assert order == ["holds", "2", "1", "0"]


async def test_a_request_that_leaves_the_queue_takes_no_slot() -> None:
    controller, order = admission(), list[str]()
    holding = asyncio.create_task(served(controller, ONE, order, "holds", 0.05))
    await asyncio.sleep(0)
    gone = asyncio.create_task(served(controller, ONE, order, "gone"))
    stays = asyncio.create_task(served(controller, ONE, order, "stays"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(holding, stays)
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert order == ["holds", "stays"]
    assert (controller.open_count, controller.waiting_count) == (0, 0)


async def test_a_request_cancelled_as_it_gets_its_slot_passes_it_on() -> None:
    controller = admission()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(controller.slot(ONE))
        gone = asyncio.create_task(controller.slot(ONE).__aenter__())
        stays = asyncio.create_task(controller.slot(ONE).__aenter__())
        await asyncio.sleep(0)
        await stack.aclose()
        gone.cancel()
        await asyncio.wait_for(stays, 1)
    assert gone.cancelled()


async def test_a_deadline_that_passes_in_the_queue_raises_deadline_passed() -> None:
    controller = admission()
    async with controller.slot(ONE):
        with pytest.raises(DeadlinePassed):
            async with controller.slot(QueuedRequest(tokens=10, deadline_s=monotonic() + 0.05)):
                pass
    assert controller.waiting_count == 0


async def test_a_request_is_rejected_when_its_queue_wait_exceeds_its_deadline() -> None:
    clock = ManualClock(0.0)
    controller = admission_of(100, Fixed(1), clock)
    for _ in range(4):
        async with controller.slot(QueuedRequest(tokens=100)):
            clock.advance(1.0)
    # Some 130 tokens a second, and 400 of the same tenant are waiting, all of them more urgent.
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(controller.slot(ONE))
        request = QueuedRequest(tokens=100, deadline_s=6.9)
        waiting = [asyncio.create_task(controller.slot(request).__aenter__()) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="deadline") as refused:
            async with controller.slot(QueuedRequest(tokens=100, deadline_s=7.0)):
                pass
        assert refused.value.retry_delay_s is not None
        assert refused.value.retry_delay_s > 1.0
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_request_is_rejected_when_its_service_time_exceeds_its_deadline() -> None:
    """It would start in time, and an engine would spend time on a response that comes too late."""
    clock = ManualClock(0.0)
    controller = admission_of(100, Fixed(1), clock)
    async with controller.slot(QueuedRequest(tokens=100)):
        clock.advance(2.0)
    async with controller.slot(ONE):
        with pytest.raises(Overloaded, match=r"service 2\.0 s"):
            async with controller.slot(QueuedRequest(tokens=10, deadline_s=3.9)):
                pass
        longer = asyncio.create_task(controller.slot(QueuedRequest(tokens=10, deadline_s=4.1)).__aenter__())
        await asyncio.sleep(0)
        assert controller.waiting_count == 1
        longer.cancel()
        await asyncio.wait({longer})


@pytest.mark.parametrize(("finished", "is_rejected"), [(1, False), (30, True)])
async def test_a_request_is_rejected_only_where_enough_have_finished_to_be_sure(
    finished: int, is_rejected: bool
) -> None:
    """As after a worker that hung: by what finished within the last second, the queue takes ten."""
    clock = ManualClock(0.0)
    controller = admission_of(100, Fixed(1), clock)
    for _ in range(finished):
        async with controller.slot(QueuedRequest(tokens=20)):
            pass
        clock.advance(1 / finished)
    async with controller.slot(ONE):
        many = QueuedRequest(tokens=200 * finished, deadline_s=13.9)
        waits = asyncio.create_task(controller.slot(many).__aenter__())
        await asyncio.sleep(0)
        last = asyncio.create_task(controller.slot(QueuedRequest(tokens=20, deadline_s=14.0)).__aenter__())
        await asyncio.sleep(0)
        was_rejected = last.done() and isinstance(last.exception(), Overloaded)
        waits.cancel()
        last.cancel()
        await asyncio.wait({waits, last})
    assert was_rejected is is_rejected


async def test_a_request_is_rejected_that_would_make_queued_ones_miss_their_deadlines() -> None:
    clock = ManualClock(0.0)
    controller = admission_of(100, Fixed(1), clock)
    for _ in range(4):
        async with controller.slot(QueuedRequest(tokens=100)):
            clock.advance(1.0)
    async with controller.slot(ONE):
        # A hundred tokens a second: it starts at once and ends after one second.
        waits = asyncio.create_task(controller.slot(QueuedRequest(tokens=100, deadline_s=6.0)).__aenter__())
        await asyncio.sleep(0)
        urgent = QueuedRequest(tokens=150, deadline_s=5.9)
        with pytest.raises(Overloaded, match="queued already"):
            async with controller.slot(urgent):
                pass
        small = asyncio.create_task(controller.slot(replace(urgent, tokens=10)).__aenter__())
        await asyncio.sleep(0)
        before_all = asyncio.create_task(controller.slot(replace(urgent, priority=1)).__aenter__())
        await asyncio.sleep(0)
        assert controller.waiting_count == 3, "a higher priority goes first, and a small one delays no other too much"
        for task in (waits, before_all, small):
            task.cancel()
        await asyncio.wait({waits, before_all, small})


@pytest.mark.parametrize("others", [0, 1])
async def test_a_hopeless_request_is_not_started_while_others_are_queued(others: int) -> None:
    clock = ManualClock(0.0)
    headroom = Fixed(1)
    controller = admission_of(100, headroom, clock)
    async with controller.slot(QueuedRequest(tokens=100)):
        clock.advance(2.0)
    holding = controller.slot(ONE)
    await holding.__aenter__()
    late = asyncio.create_task(controller.slot(QueuedRequest(tokens=10, deadline_s=5.0)).__aenter__())
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(controller.slot(QueuedRequest(tokens=10)).__aenter__()) for _ in range(others)]
    await asyncio.sleep(0)
    clock.advance(1.5)
    headroom.requests_max = 2
    controller.reevaluate()
    await asyncio.wait({late, *waiting}, timeout=1)
    assert late.done()
    assert (type(late.exception()) is Overloaded) is bool(others)
    assert all(task.done() and task.exception() is None for task in waiting), "its slot was lost"
    assert controller.waiting_count == 0


@pytest.mark.parametrize("tenants", [1, 50, 2_000])
async def test_a_rejection_is_fast_however_long_the_queue_is(tenants: int) -> None:
    clock = ManualClock()
    controller = admission_of(10_000, Fixed(1), clock)
    async with controller.slot(ONE):
        clock.advance(1)
    async with controller.slot(ONE):
        waiting = [
            asyncio.create_task(controller.slot(QueuedRequest(tokens=10, tenant=str(number % tenants))).__aenter__())
            for number in range(2_000)
        ]
        await asyncio.sleep(0)
        assert controller.waiting_count == 2_000
        begin_s = time.perf_counter()
        for _ in range(20):
            with pytest.raises(Overloaded):
                async with controller.slot(QueuedRequest(tokens=10, tenant="0", deadline_s=clock() + 0.5)):
                    pass
        assert (time.perf_counter() - begin_s) / 20 < 0.05
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_new_capacity_goes_to_the_queue() -> None:
    headroom = Fixed(1)
    controller, order = admission_of(10, headroom, monotonic), list[str]()
    holding = asyncio.create_task(served(controller, ONE, order, "holds", 0.1))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(served(controller, ONE, order, "waits"))
    await asyncio.sleep(0.01)
    assert order == ["holds"]
    headroom.requests_max = 2
    controller.reevaluate()
    await asyncio.wait_for(waiting, 0.05)
    await holding


async def test_reevaluations_are_batched() -> None:
    """A thousand reported loads must not evaluate the queue a thousand times."""
    headroom = Fixed(1)
    controller, order = admission_of(10, headroom, monotonic), list[str]()
    controller.reevaluate_soon()
    assert controller._reevaluation is None, "the queue is empty"
    holding = asyncio.create_task(served(controller, ONE, order, "holds", 10))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(served(controller, ONE, order, "waits", 10)) for _ in range(2)]
    await asyncio.sleep(0)
    assert controller.waiting_count == 2
    headroom.requests_max, headroom.asked_count = 2, 0
    for _ in range(1000):
        controller.reevaluate_soon()
    assert headroom.asked_count == 0
    await assert_eventually(lambda: len(order), lambda count: count == 2)
    assert headroom.asked_count == 2, "the first queued request fits, the second does not"
    headroom.requests_max = 3
    controller.reevaluate_soon()
    await assert_eventually(lambda: len(order), lambda count: count == 3)
    for task in (holding, *waiting):
        task.cancel()
    await asyncio.wait({holding, *waiting})


async def test_an_unbounded_max_tokens_does_not_block_the_queue() -> None:
    headroom = Capacity(decode().capabilities.model)
    headroom.follow((decode(), decode("decode-1")))
    controller, order = admission_of(10, headroom, monotonic), list[str]()
    endless = QueuedRequest(tokens=10 + 10**6, answer_tokens=10**6)
    tasks = [asyncio.create_task(served(controller, endless, order, f"endless-{number}", 5)) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.wait_for(served(controller, ONE, order, "small"), 1)
    assert sorted(order) == ["endless-0", "endless-1", "small"]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_admission_starts_prompts_only_as_prefill_has_room_for_them() -> None:
    worker = prefill()
    backlog = PrefillBacklog(worker.capabilities.model, 5.0)
    backlog.follow([worker])
    controller = admission_of(100, Fixed(100), monotonic, prefill=backlog)
    request = QueuedRequest(tokens=20, prompt_tokens=10)
    async with contextlib.AsyncExitStack() as stack:
        works = [await stack.enter_async_context(controller.slot(request)) for _ in range(UNMEASURED_PROMPTS_MAX)]
        third = asyncio.create_task(controller.slot(request).__aenter__())
        await asyncio.sleep(0)
        assert controller.waiting_count == 1
        for work in works:
            work.sent(worker.start)
        works[0].computed()
        (await third).drop()
        assert controller.waiting_count == 0
