"""The worker's view of its engine's hand-over: whether the receiving threads are alive, and what was dropped.

Reads the pulse of the scheduler processes and the counts of the bootstrap server, which runs in this process.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tandem.clock import Clock, monotonic
from tandem.domain.handover import DropReason
from tandem.engine.sglang import pulse
from tandem.engine.sglang.hooks import bootstrap_server

log = logging.getLogger(__name__)

SILENCE_MAX_S = 5.0
"""A thread that handles one message for so long hangs. One that has ended is noticed at once: its process ends."""
LOG_INTERVAL_S = 10.0


class HandoverWatch:
    """Of one engine; `check` is called periodically."""

    def __init__(self, directory: Path, clock: Clock = monotonic) -> None:
        """`directory` is the engine's, which its scheduler processes write to."""
        self._directory = directory
        self._clock = clock
        self._logged_s = float("-inf")
        self._logged_count = 0
        # The bootstrap server's counts are the process's: those of an earlier engine are not this one's.
        self._earlier = dict(bootstrap_server.dropped)
        self.trouble: str | None = None
        """Why KV cannot be handed over, in one sentence; None while it can."""
        self.dropped: dict[DropReason, int] = dict.fromkeys(DropReason, 0)
        """Messages and requests dropped since the engine's start."""

    def check(self) -> None:
        """Read the current state; log what was dropped since the last line, at most every LOG_INTERVAL_S."""
        found = pulse.read(self._directory)
        self.trouble = None
        if found.silent_s > SILENCE_MAX_S:
            self.trouble = f"the engine has read no message of the KV hand-over for {SILENCE_MAX_S:g} s"
        for reason, count in bootstrap_server.dropped.items():
            found.dropped[reason] += count - self._earlier[reason]
        self.dropped = found.dropped
        self._log(sum(found.dropped.values()))

    def _log(self, count: int) -> None:
        now_s = self._clock()
        if count <= self._logged_count or now_s - self._logged_s < LOG_INTERVAL_S:
            return
        log.warning(
            "dropped %d messages at the engine's ports for the KV hand-over, %d since start (%s): another program, "
            "such as a port scanner or a metrics scraper, sends to them",
            count - self._logged_count,
            count,
            ", ".join(f"{reason} {number}" for reason, number in self.dropped.items() if number),
        )
        self._logged_s, self._logged_count = now_s, count
