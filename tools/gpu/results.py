"""The results file: rewritten after each measurement, so that an interrupted run keeps all earlier results."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

STEP = "step_"
COMPLETE, PARTIAL, FAILED, NOT_RUN = "complete", "partial", "failed", "not run"
"""States of a step: all of its measurements were taken, some, none; or it did not begin."""
TAKEN = ""
NO_TIME = "no time was left"
REASON_LENGTH_MAX = 600
SAME_ARGUMENTS = ("device", "gpus", "dtype", "model", "kv_tokens", "engines_per_gpu")


def state(taken: Mapping[str, str]) -> dict[str, Any]:
    """The state of a step.

    Args:
        taken: by measurement `TAKEN`, or why there is none.
    """
    missing = {name: reason for name, reason in taken.items() if reason != TAKEN}
    if taken and not missing:
        return {"state": COMPLETE, "measurements": len(taken)}
    if all(reason == NO_TIME for reason in missing.values()) and len(missing) == len(taken):
        return {"state": NOT_RUN, "reason": NO_TIME if taken else "nothing was measured"}
    found = PARTIAL if len(missing) < len(taken) else FAILED
    return {"state": found, "measurements": len(taken) - len(missing), "missing": missing}


class Results:
    """Measurements by name, and when to stop taking more."""

    def __init__(self, file: Path, deadline_s: float) -> None:
        """`deadline_s` counts from now."""
        self._file = file
        self._begin_s = time.monotonic()
        self._end_s = self._begin_s + deadline_s
        self.measured: dict[str, Any] = {}
        self._taken: dict[str, str] = {}
        """Of the present step: what came of each measurement."""

    def add_to(self, arguments: Mapping[str, Any]) -> None:
        """Begin with what the file has from earlier runs, which must be of the same machine and models.

        Raises:
            ValueError: it was taken otherwise; names the argument.
        """
        if not self._file.is_file():
            return
        self.measured = json.loads(self._file.read_text())
        before = self.measured.get("arguments", {})
        for name in SAME_ARGUMENTS:
            if name in before and str(before[name]) != str(arguments.get(name)):
                raise ValueError(f"--{name}: {self._file} was taken with {before.get(name)}, not {arguments.get(name)}")

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

    async def take(
        self, name: str, needed_s: float, measure: Callable[[], Awaitable[Any]], *, proves: bool = True
    ) -> bool:
        """Measure, unless too little time is left; a failure is a result, and the next measurement goes on.

        Args:
            proves: whether it is a measurement of its step, not only what others need, such as a cluster's start.

        Returns:
            Whether there is a measurement.
        """
        if self.left_s < needed_s:
            self._taken[name] = NO_TIME
            self.keep(name, {"skipped": f"{self.left_s:.0f} s were left, and it takes {needed_s:.0f}"})
            return False
        begin_s = time.monotonic()
        try:
            value = await measure()
        except Exception as problem:
            traceback.print_exc()
            self._taken[name] = f"{type(problem).__name__}: {problem}"[:REASON_LENGTH_MAX]
            self.keep(name, {"error": f"{type(problem).__name__}: {problem}", "after_s": _since(begin_s)})
            return False
        if proves:
            self._taken[name] = TAKEN
        self.keep(name, value)
        self.report(f"{name}: {_since(begin_s)} s")
        return True

    def note(self, name: str, value: Any) -> None:
        """A measurement of the present step that follows from others."""
        self._taken[name] = TAKEN
        self.keep(name, value)

    async def step(self, name: str, measure: Callable[[], Awaitable[Any]]) -> None:
        """One step of a run, whose state follows from all that was measured in it."""
        self._taken = {}
        begin_s = time.monotonic()
        try:
            await measure()
        except Exception as problem:
            traceback.print_exc()
            self._taken[name] = f"{type(problem).__name__}: {problem}"[:REASON_LENGTH_MAX]
        self.keep(STEP + name, {**state(self._taken), "s": _since(begin_s)})

    def leave_out(self, name: str, reason: str) -> None:
        """A step that is not run."""
        self.keep(STEP + name, {"state": NOT_RUN, "reason": reason})
        self.report(f"{name} is not run: {reason}")

    def report(self, line: str) -> None:
        """Print a progress line with the time since the start to standard error."""
        print(f"[{time.monotonic() - self._begin_s:6.1f}] {line}", file=sys.stderr, flush=True)


def _since(begin_s: float) -> float:
    return round(time.monotonic() - begin_s, 1)
