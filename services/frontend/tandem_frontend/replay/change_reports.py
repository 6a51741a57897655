"""Load reports of one worker that do not wait for their interval: a prompt has come, or one is computed.

Owns their delay and how often they come. In a serving fleet `WatchLoad` does this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.fleet_file import Frontends

if TYPE_CHECKING:
    from tandem_frontend.replay.frontend import ReplayedFrontend

DELAY_S = 0.001
"""On the way to a frontend."""


class ChangeReports:
    """Those of one engine, to all frontends."""

    def __init__(self, engine: AccountedEngine, frontends: Sequence[ReplayedFrontend], settings: Frontends) -> None:
        """Needs a running loop."""
        self._engine = engine
        self._frontends = frontends
        self._interval_s = settings.change_interval_s
        self._loop = asyncio.get_running_loop()
        self._last_s = -self._interval_s
        self._is_planned = False

    def note_change(self) -> None:
        """Plan a report, unless one is planned."""
        if self._interval_s and not self._is_planned:
            self._is_planned = True
            self._loop.call_at(max(self._loop.time() + DELAY_S, self._last_s + self._interval_s), self._report)

    def _report(self) -> None:
        self._is_planned = False
        self._last_s = self._loop.time()
        if self._engine.has_left:
            return
        load = self._engine.load()
        for frontend in self._frontends:
            frontend.note_load(self._engine.worker.start, load)
