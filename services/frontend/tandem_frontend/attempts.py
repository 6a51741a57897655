"""The attempts at one request, up to the one whose legs are taken: how many there are, and where each one goes.

Owns the retry policy of requests. Only what no worker has taken is tried again, so nothing is generated twice; from
there on an attempt is the supervisor's business.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from tandem.api.types.v1 import leg_pb2
from tandem.errors import TandemError
from tandem.model.worker import Start, Worker
from tandem.runtime.clock import Clock
from tandem_frontend.dispatch import Dispatch
from tandem_frontend.routing.refusals import Refusals
from tandem_frontend.routing.routes import Routes
from tandem_frontend.supervision import Attempt

log = logging.getLogger(__name__)

ATTEMPTS_MAX = 3


class Attempts:
    """Makes attempts at requests."""

    def __init__(
        self,
        routes: Routes,
        refusals: Refusals,
        dispatch: Dispatch,
        answers: Callable[[Worker], Awaitable[bool]],
        accept_timeout_s: float,
        clock: Clock,
    ) -> None:
        """`answers` asks a worker that is slow to take its leg whether it serves."""
        self._answers = answers
        self._routes = routes
        self._refusals = refusals
        self._dispatch = dispatch
        self._accept_timeout_s = accept_timeout_s
        self._clock = clock

    @contextlib.asynccontextmanager
    async def taken(self, leg: leg_pb2.LegRequest, timeout_s: float | None) -> AsyncIterator[Attempt]:
        """An attempt whose legs their workers have taken; leaving it ends both legs.

        Args:
            leg: what all legs of the request share.
            timeout_s: what is left of the client's deadline; None: no deadline.

        Raises:
            TandemError: there is no route, or the failure of the last attempt.
        """
        async with contextlib.AsyncExitStack() as stack:
            yield await self._first_taken(stack, leg, timeout_s)

    async def _first_taken(
        self, stack: contextlib.AsyncExitStack, leg: leg_pb2.LegRequest, timeout_s: float | None
    ) -> Attempt:
        begin_s = self._clock()
        tried: set[Start] = set()
        refused: set[Start] = set()
        prompt_tokens = len(leg.token_ids)
        route, number = self._routes.first(prompt_tokens), 1
        while True:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (self._clock() - begin_s))

            async def is_lost(worker: Worker, number: int = number) -> bool:
                """Whether a worker that is slow does not answer at all, and the request has somewhere else to go."""
                elsewhere = number < ATTEMPTS_MAX and self._routes.next(prompt_tokens, tried, {*refused, worker.start})
                return bool(elsewhere) and not await self._answers(worker)

            attempt = Attempt(self._dispatch.send(route, leg, number, left_s), self._accept_timeout_s, is_lost)
            try:
                return await stack.enter_async_context(attempt)
            except TandemError as problem:
                if attempt.refused_by is None:
                    raise
                self._refusals.note(attempt.refused_by)
                refused.add(attempt.refused_by.start)
                tried.update(worker.start for worker in route.workers)
                another = self._routes.next(prompt_tokens, tried, refused) if number < ATTEMPTS_MAX else None
                if another is None:
                    raise
                log.info("attempt %d at %s: %s; trying another route", number, leg.request_id, problem)
                route, number = another, number + 1
