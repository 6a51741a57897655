"""Background tasks of a service: they end with it, and the failure of one is logged at once."""

from __future__ import annotations

import asyncio

import pytest

from tandem.service.background import BackgroundTasks
from tandem.testing.eventually import assert_eventually


async def test_tasks_end_with_the_context() -> None:
    ended = asyncio.Event()

    async def run() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with BackgroundTasks() as tasks:
        tasks.start(run(), "endless")
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_task_that_fails_is_logged_and_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    others: list[int] = []

    async def fail() -> None:
        raise ZeroDivisionError

    async def count() -> None:
        while True:
            others.append(1)
            await asyncio.sleep(0)

    async with BackgroundTasks() as tasks:
        tasks.start(fail(), "broken")
        tasks.start(count(), "other")
        await assert_eventually(lambda: "background task broken failed" in caplog.text)
        count_then = len(others)
        await assert_eventually(lambda: len(others) > count_then)
