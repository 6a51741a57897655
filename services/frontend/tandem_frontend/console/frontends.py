"""The frontends of the cluster, this one included, as the console asks them: statistics, request list, timelines.

Owns one task per frontend while statistics are followed. A frontend that does not respond is left out and named.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.client import admin_calls
from tandem.clock import Clock, monotonic
from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.errors import RequestNotFound, TandemError
from tandem.observability.fleet_sample import UNREACHABLE, FrontendSample
from tandem.tls.paths import Tls

T = TypeVar("T")

INTERVAL_S = 1.0
SILENT_S = 3.0
"""A frontend without statistics for so long is shown as unreachable."""
RETRY_S = 1.0


@dataclass(slots=True)
class _Followed:
    """A frontend whose statistics are followed."""

    task: asyncio.Task[None]
    reported_s: float
    """When its last statistics came, or it was first followed; on the clock."""
    stats: pb.WatchFiguresResponse | None = None


class ConsoleFrontends:
    """The frontends that the registry lists, and this one."""

    def __init__(self, watch: FrontendWatch, own: Frontend, tls: Tls | None = None, clock: Clock = monotonic) -> None:
        """`watch` is started and closed by the caller. `own` is asked even while the registry does not list it."""
        self._watch = watch
        self._own = own
        self._tls = tls
        self._clock = clock
        self._followed: dict[tuple[str, int, str], _Followed] = {}
        """By id, epoch and address."""

    @property
    def own(self) -> Frontend:
        """This frontend."""
        return self._own

    def listed(self) -> list[Frontend]:
        """All frontends, ordered by id."""
        known = {frontend.frontend_id: frontend for frontend in self._watch.frontends()}
        known.setdefault(self._own.frontend_id, self._own)
        return [known[name] for name in sorted(known)]

    async def ask(self, call: Callable[[str], Awaitable[T]]) -> tuple[list[tuple[str, T]], list[str]]:
        """Ask all frontends at once.

        Args:
            call: the call to the frontend at an address.

        Returns:
            The id and the response of each frontend that responded and has the request, and the ids of the others
            that did not respond.
        """
        frontends = self.listed()
        results = await asyncio.gather(*(call(one.address) for one in frontends), return_exceptions=True)
        found: list[tuple[str, T]] = []
        silent: list[str] = []
        for frontend, result in zip(frontends, results, strict=True):
            if isinstance(result, RequestNotFound):
                continue
            if isinstance(result, TandemError):
                silent.append(frontend.frontend_id)
            elif isinstance(result, BaseException):
                raise result
            else:
                found.append((frontend.frontend_id, result))
        return found, silent

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Follow the statistics while the context is open."""
        self.follow_listed()
        try:
            yield
        finally:
            tasks = [followed.task for followed in self._followed.values()]
            self._followed.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def follow_listed(self) -> None:
        """Follow those that the registry lists now, and no others."""
        wanted = {(one.frontend_id, one.epoch, one.address): one for one in self.listed()}
        for key in [key for key in self._followed if key not in wanted]:
            self._followed.pop(key).task.cancel()
        for key in [key for key in wanted if key not in self._followed]:
            task = asyncio.create_task(self._follow(key), name=f"console-{key[0]}")
            self._followed[key] = _Followed(task, self._clock())

    def samples(self) -> tuple[FrontendSample, ...]:
        """Their state now."""
        return tuple(self._sample(frontend) for frontend in self.listed())

    def _sample(self, frontend: Frontend) -> FrontendSample:
        followed = self._followed.get((frontend.frontend_id, frontend.epoch, frontend.address))
        is_fresh = followed is not None and self._clock() - followed.reported_s <= SILENT_S
        stats = followed.stats if followed is not None and is_fresh else None
        # One that is followed since a moment ago has not been silent yet.
        return FrontendSample(
            name=frontend.frontend_id,
            epoch=frontend.epoch,
            address=frontend.address,
            state=frontend.state.value if is_fresh else UNREACHABLE,
            health="ok" if is_fresh else "-",
            stats=stats,
        )

    async def _follow(self, key: tuple[str, int, str]) -> None:
        while True:
            calls = admin_calls.watch_figures(key[2], int(INTERVAL_S * 1_000), tls=self._tls)
            with contextlib.suppress(TandemError):
                async with contextlib.aclosing(calls) as reports:
                    async for report in reports:
                        followed = self._followed[key]
                        followed.stats, followed.reported_s = report, self._clock()
            await asyncio.sleep(RETRY_S)
