"""A log of lines that must not be lost, in a file or on standard error: written by a thread of its own.

Owns the file. A line is written whole, behind those of other processes that write to the same file. A file that was
renamed or removed is created again, so that it can be rotated. While it cannot be written, lines wait in memory.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from collections import deque
from pathlib import Path

from tandem.errors import ConfigError

log = logging.getLogger(__name__)

STDERR = "stderr"
LINES_MAX = 100_000
"""Lines that wait at most; further ones are lost, which is logged."""
BATCH_MAX = 256
RETRY_S = 1.0
CLOSE_TIMEOUT_S = 5.0
MODE = 0o600


class LineLog:
    """Appends lines."""

    def __init__(self, target: str, *, lines_max: int = LINES_MAX, retry_s: float = RETRY_S) -> None:
        """Open the file, or standard error for `stderr`, and start the thread.

        Raises:
            ConfigError: the file cannot be opened for appending; names the setting `usage_log`.
        """
        self._path = None if target == STDERR else Path(target)
        self._lines_max = lines_max
        self._retry_s = retry_s
        self._lines: deque[bytes] = deque()
        self._unwritten = b""
        """The rest of a batch of which a part is written."""
        self._wake = threading.Condition()
        self._is_closed = self._has_failed = False
        self.lost_count = 0
        """Lines that had no room."""
        try:
            self._file = self._open()
        except OSError as problem:
            raise ConfigError("usage_log", f"{target} cannot be opened: {problem.strerror or problem}") from None
        self._thread = threading.Thread(target=self._run, name="usage-log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Append a line, which has no line break. Never waits for the file."""
        with self._wake:
            if len(self._lines) >= self._lines_max:
                self.lost_count += 1
                if self.lost_count == 1:
                    log.error("usage_log cannot be written: %d lines wait, further ones are lost", len(self._lines))
                return
            self._lines.append(line.encode() + b"\n")
            self._wake.notify()

    def close(self) -> None:
        """Write what waits, for 5 s at most, and close the file."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(CLOSE_TIMEOUT_S)
        left = len(self._lines) + bool(self._unwritten)
        if left or self._thread.is_alive():
            log.error("usage_log was not written to its end: %d lines or more are lost", left)
        elif self._path is not None:
            os.close(self._file)

    def _open(self) -> int:
        if self._path is None:
            return sys.stderr.fileno()
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._lines and not self._unwritten and not self._is_closed:
                    self._wake.wait()
                if not self._lines and not self._unwritten:
                    return
                if not self._unwritten:
                    count = min(BATCH_MAX, len(self._lines))
                    self._unwritten = b"".join(self._lines.popleft() for _ in range(count))
                # One more try after the close: what made the one before fail may be over.
                is_last = self._is_closed
            if not self._write_some():
                with self._wake:
                    if is_last:
                        return
                    self._wake.wait_for(lambda: self._is_closed, self._retry_s)

    def _write_some(self) -> bool:
        """Write of the batch what can be written. Returns whether all of it was."""
        try:
            self._reopen_if_moved()
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as problem:
            if not self._has_failed:
                log.error("usage_log cannot be written, lines wait: %s", problem.strerror or problem)
            self._has_failed = True
            return False
        if self._has_failed:
            log.info("usage_log is written again")
        self._has_failed = False
        return True

    def _reopen_if_moved(self) -> None:
        if self._path is None:
            return
        own = os.fstat(self._file)
        if not stat.S_ISREG(own.st_mode):
            return  # a pipe or a device is not rotated
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            opened = self._open()
            os.close(self._file)
            self._file = opened
