"""Figures of all frontends in the view: one stream for each, and its last message.

Owns the streams. A frontend without a current message is unknown: what is computed over all of them needs all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import aclosing

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.client.admin_calls import watch_figures
from tandem.clock import Clock, monotonic
from tandem.domain.frontend import Frontend
from tandem.errors import TandemError
from tandem.rpc.backoff import Backoff
from tandem.service.background import log_failure
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

INTERVAL_MS = 500
EXPIRY_S = 3.0

Key = tuple[str, int]
"""Frontend id and epoch."""


class FiguresWatch:
    """Last figures of each frontend."""

    def __init__(self, tls: Tls | None, clock: Clock = monotonic) -> None:
        self._tls = tls
        self._clock = clock
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._last: dict[Key, tuple[float, pb.WatchFiguresResponse]] = {}

    def follow(self, frontends: Iterable[Frontend]) -> None:
        """Set the frontends to follow."""
        wanted = {(one.frontend_id, one.epoch): one for one in frontends}
        for key in [key for key in self._tasks if key not in wanted]:
            self._tasks.pop(key).cancel()
            self._last.pop(key, None)
        for key, frontend in wanted.items():
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._watch(key, frontend), name=f"figures-{key[0]}")
                self._tasks[key].add_done_callback(log_failure)

    def all(self) -> Sequence[pb.WatchFiguresResponse] | None:
        """The figures of all frontends; None: there is none, or one of them is silent."""
        oldest_s = self._clock() - EXPIRY_S
        current = [figures for key in self._tasks for at_s, figures in (self._last.get(key, (0.0, None)),)
                   if figures is not None and at_s >= oldest_s]  # fmt: skip
        return current if current and len(current) == len(self._tasks) else None

    async def close(self) -> None:
        """Cancel all streams."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _watch(self, key: Key, frontend: Frontend) -> None:
        backoff = Backoff(first_s=0.5, most_s=5.0)
        while True:
            try:
                async with aclosing(watch_figures(frontend.address, INTERVAL_MS, tls=self._tls)) as stream:
                    async for figures in stream:
                        self._last[key] = self._clock(), figures
                        backoff.reset()
            except TandemError as problem:
                log.debug("the figures of frontend %s ended, asking again: %s", frontend.frontend_id, problem)
            await asyncio.sleep(backoff.next_s())
