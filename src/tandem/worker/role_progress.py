"""The progress of one role change, for any number of readers: its stages, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum

from tandem.domain.worker import Worker
from tandem.errors import TandemError


class Stage(Enum):
    """Stages in their order."""

    DRAINING = "draining"
    SWITCHING = "switching"
    REGISTERING = "registering"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One report; the last three fields are those of DONE."""

    stage: Stage
    open_legs: int = 0
    worker: Worker | None = None
    in_place: bool | None = None
    switch_s: float | None = None


class RoleProgress:
    """Written by the change, read while it runs and after its end."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._problem: TandemError | None = None
        self._changed = asyncio.Event()

    def report(self, step: Step) -> None:
        """The next step; DONE is the last one."""
        if not self._steps or step != self._steps[-1]:
            self._steps.append(step)
            self._wake()

    def fail(self, problem: TandemError) -> None:
        """The change has ended with an error."""
        self._problem = problem
        self._wake()

    async def steps(self) -> AsyncIterator[Step]:
        """All steps from the first one on, to the end.

        Raises:
            TandemError: the change failed.
        """
        count = 0
        while True:
            while count < len(self._steps):
                count += 1
                yield self._steps[count - 1]
                if self._steps[count - 1].stage is Stage.DONE:
                    return
            if self._problem is not None:
                raise self._problem
            await self._changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
