"""All links of this frontend: one to each worker of the registry's view, opened before it is needed.

Owns which links exist. A worker that leaves the view keeps its link until its last leg here has ended: it may have lost
nothing but its registry.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable

from tandem.client.step_calls import WorkerCalls
from tandem.domain.worker import LEG_CONTRACT, Start, Worker
from tandem.errors import ServiceError
from tandem.service.awake_timers import AwakeTimers
from tandem_frontend.execution.link_leg import Bounds
from tandem_frontend.execution.worker_link import WorkerLink

OPENING_MAX = 16
"""Links that open at a time: a thousand at once would not all open within gRPC's connect timeout."""
RETIRE_S = 1.0
"""Interval at which retired links are checked for being idle."""


class WorkerLinks:
    """Links by start of a worker, from the first `follow` to `close`."""

    def __init__(
        self,
        frontend_id: str,
        calls: WorkerCalls,
        bounds: Bounds,
        timers: AwakeTimers,
        check_health: Callable[[Worker], Awaitable[bool]],
    ) -> None:
        """`check_health` checks once whether a worker serves."""
        self._frontend_id = frontend_id
        self._calls = calls
        self._bounds = bounds
        self._timers = timers
        self._check_health = check_health
        self._opening = asyncio.Semaphore(OPENING_MAX)
        self._links: dict[Start, WorkerLink] = {}
        self._retired: set[WorkerLink] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closing_idle = False

    def follow(self, workers: Iterable[Worker]) -> None:
        """Open links to new workers, and close those to removed ones once they are idle."""
        wanted = {worker.start: worker for worker in workers if worker.leg_contract == LEG_CONTRACT}
        for start in [start for start in self._links if start not in wanted]:
            self._retire(self._links.pop(start))
        for worker in wanted.values():
            if worker.start in self._links:
                self._links[worker.start].worker = worker
            else:
                # Without usable TLS files there is no link; the first leg to this worker reports it.
                with contextlib.suppress(ServiceError):
                    self._open(worker)

    def get(self, worker: Worker) -> WorkerLink:
        """The link to a worker.

        Raises:
            ServiceError: the worker cannot be connected to.
        """
        link = self._links.get(worker.start)
        if link is not None and link.connection is self._calls.connection(worker):
            return link
        if link is not None:
            # The certificate was renewed, which replaced the channel.
            self._retire(self._links.pop(worker.start))
        return self._open(worker)

    async def close(self) -> None:
        """Close all links. May be called twice."""
        links, self._links = [*self._links.values(), *self._retired], {}
        self._retired.clear()
        if links:
            await asyncio.gather(*(link.close() for link in links))
        if self._closing:
            await asyncio.wait(self._closing)

    def _open(self, worker: Worker) -> WorkerLink:
        link = self._links[worker.start] = WorkerLink(
            worker, self._frontend_id, self._calls, self._bounds, self._timers, self._check_health, self._opening
        )
        return link

    def _retire(self, link: WorkerLink) -> None:
        self._retired.add(link)
        if not self._is_closing_idle:
            self._is_closing_idle = True
            self._close_idle()

    def _close_idle(self) -> None:
        for link in [link for link in self._retired if not link.leg_count]:
            self._retired.discard(link)
            task = asyncio.create_task(link.close(), name=f"close-{link.worker.worker_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._is_closing_idle = bool(self._retired)
        if self._is_closing_idle:
            self._timers.after(RETIRE_S, self._close_idle)
