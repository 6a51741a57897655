"""The supervisor of a service's background tasks: each runs until the service stops, and a failure is logged at once.

Owns the tasks. A task whose end must end the process is awaited by its service instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class BackgroundTasks:
    """Tasks that run until this context ends. The failure of one leaves the others running."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> BackgroundTasks:
        """Start no task yet."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` until it ends or this context does."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(log_failure)
        self._tasks.append(task)


def log_failure(task: asyncio.Task[None]) -> None:
    """Done callback of a task that runs until it is cancelled: asyncio logs a failure only when its owner is gone."""
    if not task.cancelled() and (problem := task.exception()) is not None:
        log.error("background task %s failed, and does not run any more", task.get_name(), exc_info=problem)
