"""The part of its connections in use, which Envoy needs to close idle ones sooner."""

from __future__ import annotations

import pytest
from tandem_edge.connection_pressure import ConnectionPressure

pytestmark = pytest.mark.asyncio


async def test_each_change_is_published_once() -> None:
    counts, published = [0, 0, 3, 500, 501, 2_000], list[float]()

    async def count() -> int:
        return counts.pop(0)

    pressure = ConnectionPressure(count, published.append, 1_000)
    while counts:
        await pressure.look()
    assert published == [0.0, 0.5, 1.0]


async def test_what_could_not_be_published_is_tried_again() -> None:
    published, is_full = list[float](), True

    async def count() -> int:
        return 70

    def publish(part: float) -> None:
        if is_full:
            raise OSError("no space left on device")
        published.append(part)

    pressure = ConnectionPressure(count, publish, 100)
    with pytest.raises(OSError, match="no space"):
        await pressure.look()
    is_full = False
    await pressure.look()
    assert published == [0.7]
