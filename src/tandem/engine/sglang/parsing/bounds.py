"""Bounds on the processor time, the text and the memory of parsing, so that one stream cannot hold up the others.

Owns the timer and the amounts. A parser that exceeds its time is interrupted where it is, also inside a regular
expression: the signal's exception passes through it, and only its stream fails.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")

STEP_CPU_S = 0.5
"""For one message; an ordinary one takes some 30 us."""
STREAM_CPU_S = 2.0
"""For all messages of a stream."""
CHAR_CPU_S = 100e-6
"""In addition for each character of text, for a step and for a stream; ordinary text takes some 7 us."""
REQUEST_CPU_S = 2.0
"""For a message that builds parsers or grammars of a request's tools."""
TEXT_CHARS_MAX = 4 * 1_024 * 1_024
MEMORY_BYTES_MAX = 1_024 * 1_024 * 1_024
"""What a process may allocate beyond what it has at its start."""
REPEAT_S = 0.05


class BoundExceeded(Exception):
    """A stream has exceeded a bound; the message names it."""


class OutOfTime(BaseException):
    """Interrupts a parser. Not an Exception: SGLang's detectors catch those and go on."""


class StepTimer:
    """Interrupts what runs too long. One per process, on its main thread."""

    def __init__(self) -> None:
        self._is_armed = False
        signal.signal(signal.SIGPROF, self._interrupt)

    def run(self, work: Callable[[], Result], cpu_s: float) -> tuple[Result, float]:
        """Do the work, at most for that much processor time; returns its result and the time it used.

        Raises:
            BoundExceeded: it was interrupted.
        """
        limit_s = max(cpu_s, REPEAT_S)
        self._is_armed = True
        # Repeated, because a bare `except` in a detector may catch the first one.
        signal.setitimer(signal.ITIMER_PROF, limit_s, REPEAT_S)
        try:
            result = work()
        except OutOfTime:
            raise BoundExceeded(f"parsing took more than {limit_s:.2g} s of processor time") from None
        finally:
            self._is_armed = False
            left_s, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        return result, limit_s - left_s

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            raise OutOfTime


def limit_memory() -> None:
    """Bound what this process allocates from now on: beyond it, a MemoryError ends the stream that asks for more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
