"""The first end of a backend's tasks, each of which runs until it is cancelled: one that ends by itself has failed.

Can be waited for before any task has started. Owns no task.
"""

from __future__ import annotations

import asyncio


class TaskEnds:
    """Needs a running event loop."""

    def __init__(self) -> None:
        self._first: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def watch(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Report the end of this task; returns the task."""
        task.add_done_callback(self._on_end)
        return task

    async def wait_first(self) -> str:
        """Return the name and the error of the first task that has ended."""
        return await asyncio.shield(self._first)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        problem = None if task.cancelled() else task.exception()
        if not self._first.done():
            self._first.set_result(f"task {task.get_name()} failed: {problem!r}")
