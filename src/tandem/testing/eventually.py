"""Waiting for a condition in tests, instead of sleeping and hoping.

A failed wait says what was last seen, so that a red test explains itself.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def assert_eventually(
    probe: Callable[[], Awaitable[T]],
    accept: Callable[[T], object] = bool,
    *,
    within_s: float = 5.0,
    every_s: float = 0.02,
    what: str = "condition",
) -> T: ...


@overload
async def assert_eventually(
    probe: Callable[[], T],
    accept: Callable[[T], object] = bool,
    *,
    within_s: float = 5.0,
    every_s: float = 0.02,
    what: str = "condition",
) -> T: ...


async def assert_eventually(
    probe: Callable[[], Any],
    accept: Callable[[Any], object] = bool,
    *,
    within_s: float = 5.0,
    every_s: float = 0.02,
    what: str = "condition",
) -> Any:
    """Look again and again until what is seen is accepted, and return it.

    Args:
        probe: looks once; may be a coroutine function. An AssertionError inside it counts as "not yet".
        accept: whether that is it.
        within_s: the bound.
        every_s: pause between two looks.
        what: how the condition is named when it never came true.

    Raises:
        AssertionError: it was not accepted within the bound; says what was seen last.
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
