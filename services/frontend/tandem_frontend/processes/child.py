"""A child process: a frontend that gets its connections from its parent, and drains and stops on the parent's request.

Owns the order of its start and end. It neither registers nor listens on a port: the parent does both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tandem.errors import StartError
from tandem.service import process
from tandem.service.prefork.child import ParentLink
from tandem.service.prefork.process import State
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import PROGRAM, FrontendConfig
from tandem_frontend.processes.identity import ProcessIdentity
from tandem_frontend.processes.membership import Membership


def run(link: ParentLink) -> int:
    """Run a child process until it ends; returns the exit status."""
    begin = link.wait_begin()
    identity = ProcessIdentity.parsed(begin["identity"])
    config = FrontendConfig.model_validate(begin["settings"])
    try:
        return process.run(
            PROGRAM, config, lambda settings: FrontendChild.open(settings, identity, link), process=identity.number
        )
    except StartError as problem:
        link.fail(problem)
        return problem.exit_status


class FrontendChild:
    """The child as `tandem.service.process` runs it."""

    def __init__(self, app: FrontendApp, link: ParentLink) -> None:
        self._app = app
        self._link = link

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: FrontendConfig, identity: ProcessIdentity, link: ParentLink
    ) -> AsyncIterator[FrontendChild]:
        """Enter when it serves; release everything on exit.

        Raises:
            StartError: see `FrontendApp.open`.
        """
        async with FrontendApp.open(config, Membership(identity, link)) as app:
            link.enter(State.SERVING)
            yield cls(app, link)

    @property
    def address(self) -> str:
        """host:port of the frontend."""
        return self._app.address

    @property
    def metrics_port(self) -> int:
        """0: the parent exposes its metrics."""
        return 0

    async def drain(self) -> bool:
        """Drain like a single frontend, once the parent agrees. Returns when the parent stops it, drained or not."""
        await self._link.agree_on_drain()
        self._link.enter(State.DRAINING)
        draining = asyncio.ensure_future(self._app.drain())
        stopped = asyncio.ensure_future(self._link.wait_stop())
        await asyncio.wait({draining, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            await asyncio.wait({draining})
            return False
        is_clean = draining.result()
        self._link.report_drained(is_clean=is_clean)
        await stopped
        return is_clean

    async def wait_finished(self) -> str | None:
        """Return None when the parent asks it to drain."""
        await self._link.wait_asked()
        return None
