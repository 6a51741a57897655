"""The results file: rewritten after each measurement, so that an interrupted run keeps all earlier results."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any


class Results:
    """Measurements by name, and when to stop taking more."""

    def __init__(self, file: Path, deadline_s: float) -> None:
        """`deadline_s` counts from now."""
        self._file = file
        self._begin_s = time.monotonic()
        self._end_s = self._begin_s + deadline_s
        self.measured: dict[str, Any] = {}

    @property
    def left_s(self) -> float:
        """Time until the deadline."""
        return self._end_s - time.monotonic()

    def keep(self, name: str, value: Any) -> None:
        """Note a measurement and write all of them."""
        self.measured[name] = value
        scratch = self._file.with_suffix(".part")
        scratch.write_text(json.dumps(self.measured, indent=1))
        scratch.replace(self._file)

    async def take(self, name: str, needed_s: float, measure: Callable[[], Awaitable[Any]]) -> bool:
        """Measure, unless too little time is left; a failure is a result, and the next measurement goes on.

        Returns:
            Whether there is a measurement.
        """
        if self.left_s < needed_s:
            self.keep(name, {"skipped": f"{self.left_s:.0f} s were left, and it takes {needed_s:.0f}"})
            return False
        begin_s = time.monotonic()
        try:
            value = await measure()
        except Exception as problem:
            traceback.print_exc()
            self.keep(name, {"error": f"{type(problem).__name__}: {problem}", "after_s": _since(begin_s)})
            return False
        self.keep(name, value)
        self.report(f"{name}: {_since(begin_s)} s")
        return True

    def report(self, line: str) -> None:
        """Print a progress line with the time since the start to standard error."""
        print(f"[{time.monotonic() - self._begin_s:6.1f}] {line}", file=sys.stderr, flush=True)


def _since(begin_s: float) -> float:
    return round(time.monotonic() - begin_s, 1)
