"""Waiting for a condition in tests instead of sleeping a fixed time.

A timeout reports the last value seen, so that the failure explains itself.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")
WITHIN_S = 15.0
"""Default timeout: room for what takes a second of CPU time, such as the start of a process, on a busy machine."""


@overload
async def assert_eventually(
    probe: Callable[[], Awaitable[T]],
    accept: Callable[[T], object] = bool,
    *,
    within_s: float = WITHIN_S,
    every_s: float = 0.02,
    what: str = "condition",
) -> T: ...


@overload
async def assert_eventually(
    probe: Callable[[], T],
    accept: Callable[[T], object] = bool,
    *,
    within_s: float = WITHIN_S,
    every_s: float = 0.02,
    what: str = "condition",
) -> T: ...


async def assert_eventually(
    probe: Callable[[], Any],
    accept: Callable[[Any], object] = bool,
    *,
    within_s: float = WITHIN_S,
    every_s: float = 0.02,
    what: str = "condition",
) -> Any:
    """Poll `probe` until `accept` is true for its value, and return that value.

    Args:
        probe: returns the current value; may be a coroutine function. An AssertionError counts as "not yet".
        accept: whether the value is the expected one.
        within_s: timeout in seconds.
        every_s: polling interval in seconds.
        what: name of the condition in the error.

    Raises:
        AssertionError: no accepted value within the timeout; contains the last value.
    """
    end_time_s = time.monotonic() + within_s
    while True:
        try:
            found = probe()
            seen = await found if inspect.isawaitable(found) else found
            if accept(seen):
                return seen
            last = repr(seen)
        except AssertionError as problem:
            last = f"assertion: {problem}"
        if time.monotonic() > end_time_s:
            raise AssertionError(f"{what} did not come true within {within_s} s; last seen: {last}")
        await asyncio.sleep(every_s)
