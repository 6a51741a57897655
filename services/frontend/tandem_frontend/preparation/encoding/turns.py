"""Limits concurrent jobs: `width` run at a time, the others wait in order of arrival.

Owns the running jobs. When a caller is cancelled, its running job goes on and keeps its turn to its end: work in a
thread or another process cannot be cancelled. A job that still waits is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """A first-come, first-served limit. Can be created outside of an event loop."""

    def __init__(self, width: int) -> None:
        """`width`: jobs that run at a time."""
        self._free = width
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def waiting_count(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Jobs that run."""
        return len(self._running)

    async def run(self, job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a job in its turn. Returns or raises what the job does."""
        await self._begin()
        task = asyncio.create_task(job())
        self._running.add(task)
        task.add_done_callback(self._end)
        return await asyncio.shield(task)

    async def wait_idle(self) -> None:
        """Return when no job runs or waits."""
        while self._running or self._waiting:
            # A waiting job starts when a running one ends, so there is always one to wait for.
            await asyncio.wait(self._running.copy())

    async def _begin(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(turn)
            else:
                # The turn was assigned in the same iteration of the loop in which the caller was cancelled.
                self._pass_on()
            raise

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # A cancelled caller never retrieves the exception, and asyncio would log that as an error.
            task.exception()
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
