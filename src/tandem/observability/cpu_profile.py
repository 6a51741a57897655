"""CPU profile of this process's event loop, by pyinstrument: samples its stack 1,000 times per second.

Owns the recorder and its two output formats. Needs no root; pyinstrument is loaded by the first profile. Other threads
are not sampled: a frontend works on its event loop, except for the tokenizer's Rust code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.errors import NotSupported
from tandem.observability.profiles import Wanted

if TYPE_CHECKING:
    from pyinstrument import Profiler
    from pyinstrument.session import Session

INTERVAL_S = 0.001
SPEEDSCOPE, HTML = "speedscope", "html"


class CpuProfiler:
    """A `tandem.observability.profiles.Profiler`."""

    forms: tuple[str, ...] = (SPEEDSCOPE, HTML)

    async def start(self, directory: Path, form: str, wanted: Wanted) -> CpuRecording:
        """Start sampling the thread of this event loop.

        Raises:
            NotSupported: pyinstrument is not installed.
        """
        try:
            from pyinstrument import Profiler
        except ImportError:
            raise NotSupported("pyinstrument, which records the profile, is not installed") from None
        # disabled: profile the whole loop, not only the task that called start().
        recorder = Profiler(interval=INTERVAL_S, async_mode="disabled")
        recorder.start()
        return CpuRecording(recorder, directory, form)


class CpuRecording:
    """A `tandem.observability.profiles.Recording`."""

    def __init__(self, recorder: Profiler, directory: Path, form: str) -> None:
        self._recorder = recorder
        self._form = form
        self._file = directory / ("profile.speedscope.json" if form == SPEEDSCOPE else "profile.html")

    async def stop(self) -> None:
        """Stop and write the file in a thread: rendering a minute of samples takes seconds."""
        session = self._recorder.stop()
        await asyncio.to_thread(self._write, session)

    def _write(self, session: Session) -> None:
        self._file.write_text(_renderer(self._form)(session))


def _renderer(form: str) -> Callable[[Session], str]:
    from pyinstrument.renderers import HTMLRenderer, SpeedscopeRenderer

    renderer: Callable[[Session], str] = (
        SpeedscopeRenderer(show_all=True).render if form == SPEEDSCOPE else HTMLRenderer().render
    )
    return renderer
