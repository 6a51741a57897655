"""So many jobs at a time, and the others in the order in which they came.

Owns the jobs that run. A caller that leaves while its job runs leaves it behind, and the job keeps its turn to its
end: what it does in a thread or in another process cannot be called back. One that leaves while it waits gives its turn
back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """A queue before something of which there are few. Belongs to no event loop before a job has to wait."""

    def __init__(self, width: int) -> None:
        """`width` jobs run at a time."""
        self._free = width
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def waiting_count(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Jobs that have."""
        return len(self._running)

    async def run(self, job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the job returns or raises, once it has had its turn."""
        await self._begin()
        task = asyncio.create_task(job())
        self._running.add(task)
        task.add_done_callback(self._end)
        return await asyncio.shield(task)

    async def wait_idle(self) -> None:
        """Return when no job runs, and none waits."""
        while self._running or self._waiting:
            # One that waits has its turn as soon as one ends that runs.
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
                # It came in the same moment.
                self._pass_on()
            raise

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # A caller that has left does not read the failure; unread, it would be logged as a defect.
            task.exception()
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
