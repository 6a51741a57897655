"""Adapts the engine's profiler to `tandem.observability.profiles`: a worker's profile is its engine's."""

from __future__ import annotations

from pathlib import Path

from tandem.engine.port import Engine
from tandem.observability.profiles import Wanted

CHROME_TRACE = "chrome_trace"


class EngineProfiler:
    """A `tandem.observability.profiles.Profiler`."""

    forms: tuple[str, ...] = (CHROME_TRACE,)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def start(self, directory: Path, form: str, wanted: Wanted) -> None:
        """Start recording in the engine."""
        await self._engine.start_profile(directory, steps_max=wanted.steps_max, with_stack=wanted.with_stack)

    async def stop(self) -> None:
        """Stop recording; return when the files are written."""
        await self._engine.stop_profile()
