"""By how much the event loop is late: whatever holds it up holds up every stream.

Owns one timer and no opinion about its figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PERIOD_S = 0.25


async def watch_lag(tell: Callable[[float], None]) -> None:
    """Tell at each period, without end, by how many seconds it came late."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        tell(max(0.0, loop.time() - due_s))
