"""Requests that find no worker wait here for the registry's next view, within bounds.

Owns when such a wait makes sense and how long it takes. While workers are restarted one after another, the view can be
behind: the old worker is gone, and the new one has registered at a registry that the frontend does not follow yet.
`request_stream` decides which requests wait.
"""

from __future__ import annotations

import asyncio
import math

from tandem.clock import Clock
from tandem.errors import DeadlinePassed, ServiceError


class MissingWorkers:
    """Since when this frontend lacks workers, for all its requests together.

    All of them wait until the same moment: in a long outage a request is refused at once, as without any wait.
    """

    def __init__(self, clock: Clock, wait_s: float = 0.0) -> None:
        """`wait_s`: how long requests wait after a worker was first missed; 0: never."""
        self.clock = clock
        self.wait_s = wait_s
        self._has_route = False
        self._since_s: float | None = -math.inf
        """None: no worker is missed. A frontend that has never had a route expects none."""
        self._next_view = asyncio.Event()

    @property
    def has_route(self) -> bool:
        """Whether the view has workers for some request."""
        return self._has_route

    def follow(self, *, has_route: bool) -> None:
        """Apply a new view and wake the requests that wait for it."""
        if has_route:
            self._since_s = None
        elif self._has_route:
            self._since_s = self.clock()
        self._has_route = has_route
        seen, self._next_view = self._next_view, asyncio.Event()
        seen.set()

    def served(self) -> None:
        """Workers have accepted a request: what another one misses begins anew."""
        if self._has_route:
            self._since_s = None

    def left_s(self) -> float:
        """Seconds that a request may wait from now on, which counts as missing a worker; 0 or less: none."""
        if self._since_s is None:
            self._since_s = self.clock()
        return self._since_s + self.wait_s - self.clock()

    async def next_view(self) -> None:
        """Return at the next view."""
        await self._next_view.wait()


class ViewWait:
    """The waits of one request, `wait_s` in all until it gets a token."""

    def __init__(self, missing: MissingWorkers) -> None:
        self._missing = missing
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds waited so far."""
        return self._waited_s

    def reset(self) -> None:
        """The request has got a token: a later failure has the whole time again."""
        self._waited_s = 0.0

    async def next_view(self, deadline_left_s: float | None) -> bool:
        """Wait for the next view. Returns False when there was none in time, at once where a wait makes no sense.

        Raises:
            DeadlinePassed: `deadline_left_s` ended before that; None: there is no deadline.
        """
        left_s = min(self._missing.wait_s - self._waited_s, self._missing.left_s())
        if left_s <= 0:
            return False
        has_deadline = deadline_left_s is not None and deadline_left_s < left_s
        begin_s = self._missing.clock()
        try:
            async with asyncio.timeout(deadline_left_s if has_deadline else left_s):
                await self._missing.next_view()
        except TimeoutError:
            if has_deadline:
                raise DeadlinePassed("the deadline passed while the request waited for a worker to register") from None
            return False
        finally:
            self._waited_s += max(0.0, self._missing.clock() - begin_s)
        return True

    def explained(self, problem: ServiceError) -> ServiceError:
        """The error of a request that has waited without effect: with the wait, in its text and in `waited_s`."""
        if self._waited_s > 0:
            problem.metadata["waited_s"] = f"{self._waited_s:.1f}"
            problem.message += f"; no worker registered within {self._waited_s:.1f} s (no_worker_wait_s)"
            problem.args = (problem.message,)
        return problem
