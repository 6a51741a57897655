"""The bound on open requests, and the end of admission."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from tandem_frontend.admission import Admission

from tandem.errors import Draining, Overloaded


async def test_places_are_given_back_however_a_request_ends() -> None:
    admission = Admission(1)
    with contextlib.suppress(ValueError), admission.admit():
        raise ValueError
    with admission.admit():
        assert admission.open_count == 1
        with pytest.raises(Overloaded) as refused, admission.admit():
            pass
        assert refused.value.retry_delay_s is not None
    assert admission.open_count == 0


async def test_a_closed_door_lets_those_inside_finish() -> None:
    admission = Admission(2)
    with admission.admit():
        admission.close()
        with pytest.raises(Draining), admission.admit():
            pass
        waiting = asyncio.create_task(admission.wait_none())
        await asyncio.sleep(0)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 1)
