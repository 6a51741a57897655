"""Bounds the log files of a local cluster: what grows too long moves to `NAME.log.1`, which replaces an earlier one.

The children keep their files open, and Envoy writes through an inherited descriptor. So a file is copied and emptied in
place; a line that is written between the two is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

LOG_BYTES_MAX = 64 * 2**20
"""Of one file; a process has two at most."""
CHECK_INTERVAL_S = 5.0
"""An edge under a flood of requests writes some megabytes in that time."""


class LoggedProcess(Protocol):
    """A process with a log file."""

    log: Path

    def log_emptied(self) -> None:
        """Its log has been emptied."""
        ...


async def keep_bounded(processes: Iterable[LoggedProcess], interval_s: float = CHECK_INTERVAL_S) -> None:
    """Check all log files periodically until cancelled."""
    every = list(processes)
    while True:
        await asyncio.sleep(interval_s)
        for process in every:
            try:
                if await asyncio.to_thread(rotate, process.log):
                    process.log_emptied()
            except OSError as problem:
                # A full disk must not end the cluster.
                log.warning("cannot rotate %s: %s", process.log, problem)


def rotate(file: Path, bytes_max: int = LOG_BYTES_MAX) -> bool:
    """Copy a file that is longer than `bytes_max` to `NAME.1` and empty it. Returns whether it did.

    Raises:
        OSError: the copy failed; the file is unchanged.
    """
    if not file.exists() or file.stat().st_size <= bytes_max:
        return False
    copy = file.with_name(f"{file.name}.1")
    shutil.copyfile(file, copy)
    os.truncate(file, 0)
    return True
