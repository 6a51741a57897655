"""Requests of low priority in admission: no limit of live requests counts them, and they never stand in their way."""

from __future__ import annotations

import asyncio

import pytest
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.queue import QueuedRequest

from tandem.clock import monotonic
from tandem.errors import Draining, Overloaded
from tandem.testing.eventually import assert_eventually
from tests.unit.support.admission import admission_of

ONE = QueuedRequest(tokens=10, tenant="live")
LARGE = QueuedRequest(tokens=100, tenant="live")
TOKENS_MAX = 105
ROW = QueuedRequest(tokens=10, tenant="batch:live")


class Workers:
    """Capacity for a fixed number of requests, some of them of other frontends."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max
        self.reported = 0

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        return held_requests < self.requests_max and held_tokens + tokens <= TOKENS_MAX

    def others(self, held_requests: int, held_tokens: int) -> tuple[int, int]:
        return max(0, self.reported - held_requests), 0

    def fits_beside(self, requests: int, tokens: int) -> bool:
        return requests <= self.requests_max


def admission(
    requests_max: int = 4, open_max: int = 2, tenant_share: float = 0.75
) -> tuple[Admission, BackgroundShare]:
    workers = Workers(requests_max)
    share = BackgroundShare(100, 0.1, monotonic)
    others = share.add(workers)
    return (
        admission_of(open_max, workers, monotonic, background=share, others=others, tenant_share=tenant_share),
        share,
    )


async def test_rows_take_none_of_the_open_requests() -> None:
    controller, share = admission(open_max=1)
    with controller.admit_background(), controller.admit_background():
        async with controller.background_slot(ROW), controller.background_slot(ROW):
            assert controller.open_count == 0
            controller.charge("live")
            with controller.admit("live"):
                assert share.live == 1
    assert share.live == 0


async def test_rows_leave_a_quarter_of_the_capacity_free() -> None:
    controller, _ = admission(requests_max=4)
    async with controller.background_slot(ROW), controller.background_slot(ROW), controller.background_slot(ROW):
        assert not controller.has_spare()
        with pytest.raises(Overloaded) as refused:
            async with controller.background_slot(ROW):
                pass
        assert refused.value.metadata["limit"] == "batch"
        async with controller.slot(ONE):
            pass
    assert controller.has_spare()


async def test_rows_that_have_not_reached_the_workers_count() -> None:
    controller, share = admission(requests_max=4)
    share.note_rows(3)
    assert not controller.has_spare()
    share.note_rows(2)
    assert controller.has_spare()


async def test_no_row_starts_while_a_live_request_waits() -> None:
    controller, _ = admission(requests_max=10)

    async def wait() -> None:
        async with controller.slot(LARGE):
            pass

    async with controller.slot(ONE):
        assert controller.has_spare()
        # There is capacity for rows, but none for this one.
        waiting = asyncio.create_task(wait())
        await assert_eventually(lambda: controller.waiting_count == 1)
        assert not controller.has_spare()
        with pytest.raises(Overloaded):
            async with controller.background_slot(ROW):
                pass
    await waiting
    assert controller.has_spare()


async def test_a_row_that_ends_starts_the_live_request_that_waits() -> None:
    controller, _ = admission(requests_max=1)

    async def live() -> None:
        async with controller.slot(ONE):
            pass

    async with controller.background_slot(ROW):
        waiting = asyncio.create_task(live())
        await assert_eventually(lambda: controller.waiting_count == 1)
    await asyncio.wait_for(waiting, 15)


async def test_rows_are_no_other_tenant() -> None:
    """A tenant that is alone gets all of the workers, also beside rows."""
    controller, _ = admission(requests_max=4, open_max=100)
    with controller.admit_background():
        async with controller.background_slot(ROW), controller.slot(ONE), controller.slot(ONE), controller.slot(ONE):
            pass


async def test_a_frontend_that_drains_starts_no_row() -> None:
    controller, _ = admission()
    controller.requests.close()
    assert not controller.has_spare()
    with pytest.raises(Draining), controller.admit_background():
        pass
