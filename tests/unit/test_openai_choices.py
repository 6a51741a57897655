"""Several generations as one stream: all events once, in each one's order; one failure or one early leave ends all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tandem_frontend.openai.choices import merged

from tandem.errors import LegFailed


class Source:
    """A generation that counts."""

    def __init__(self, count: int, delay_s: float = 0.0, *, fails: bool = False) -> None:
        self.count = count
        self.delay_s = delay_s
        self.fails = fails
        self.given = 0
        self.is_closed = False

    async def events(self) -> AsyncGenerator[Any, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(self.delay_s)
                self.given += 1
                yield number
            if self.fails:
                raise LegFailed("broken")
        finally:
            self.is_closed = True


async def read(sources: list[Source]) -> list[tuple[int, Any]]:
    return [event async for event in merged([source.events() for source in sources])]


@pytest.mark.parametrize("counts", [[3], [0], [0, 2], [5, 1, 3], [1] * 20])
async def test_every_event_once_and_in_order(counts: list[int]) -> None:
    events = await read([Source(count) for count in counts])
    for number, count in enumerate(counts):
        assert [event for source, event in events if source == number] == list(range(count))
    assert len(events) == sum(counts)


async def test_a_quick_one_does_not_wait_for_a_slow_one() -> None:
    events = await read([Source(2, 0.05), Source(20)])
    assert [number for number, _ in events[:20]].count(1) >= 18


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_one_failure_ends_all(others: int) -> None:
    slow = [Source(1_000, 0.01) for _ in range(others)]
    with pytest.raises(LegFailed):
        await read([*slow, Source(2, fails=True)])
    assert all(source.is_closed and source.given < 1_000 for source in slow)


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_early_ends_all(count: int) -> None:
    sources = [Source(1_000, 0.001) for _ in range(count)]
    async with contextlib.aclosing(merged([source.events() for source in sources])) as events:
        async for _ in events:
            break
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("count", [1, 2])
async def test_it_reads_no_faster_than_it_is_read(count: int) -> None:
    sources = [Source(1_000) for _ in range(count)]
    async with contextlib.aclosing(merged([source.events() for source in sources])) as events:
        async for _ in events:
            await asyncio.sleep(0.01)
            break
        assert all(source.given <= 2 for source in sources)
