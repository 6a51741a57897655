"""Profiles of this process, on request: bounded in time and size, one at a time, and only where a setting allows it.

Owns the bounds, the order (record, stop, send, forget) and the files. How a profile is recorded is a `Profiler`'s: of
Python in `cpu_profile.py`, of an engine in `tandem.worker.engine_profile`. Knows no gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.clock import Clock, monotonic
from tandem.errors import AdminDisabled, NotSupported, Overloaded, ProfileFailed
from tandem.service import run_directory

SETTING = "admin_enabled"
CHUNK_BYTES = 2**20
STOP_ALLOWANCE_S = 2.0
"""What a recorder takes to write its files, as far as a caller that comes meanwhile is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a caller asks for, within bounds."""

    duration_s: float
    size_bytes_max: int
    steps_max: int
    """Of an engine: recording ends early when it has done so many."""
    with_stack: bool
    form: str | None
    """One of the profiler's forms; None: its first."""


@dataclass(frozen=True, slots=True)
class Started:
    """Recording has begun."""

    form: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """A file begins; its bytes follow."""

    name: str
    size_bytes: int


Part = Started | ProfileFile | bytes


class Profiler(Protocol):
    """Records one profile at a time."""

    forms: tuple[str, ...]
    """Names in ProfileFormat without its prefix, in lower case; the first is the default."""

    async def start(self, directory: Path, form: str, wanted: Wanted) -> None:
        """Begin to record.

        Raises:
            TandemError: it cannot.
        """
        ...

    async def stop(self) -> None:
        """Stop recording, and leave the files in the directory. Called once for each `start` that did not raise.

        Raises:
            TandemError: there is no profile.
        """
        ...


class Profiles:
    """The profiles of one process."""

    def __init__(
        self, profiler: Profiler, *, enabled: bool, clock: Clock = monotonic, process: int | None = None
    ) -> None:
        """`process` is the number of this process, with which names of files begin where there are several."""
        self._prefix = "" if process is None else f"{process}-"
        self._profiler = profiler
        self._enabled = enabled
        self._clock = clock
        self._end_s: float | None = None
        """When the recording in hand will be over; None: there is none."""

    async def capture(self, wanted: Wanted) -> AsyncGenerator[Part, None]:
        """Record, then give the files out; closing this early ends the recording and forgets it.

        Raises:
            AdminDisabled: this process gives no profiles.
            NotSupported: not in that form, or not with this engine.
            Overloaded: another one is being recorded.
            ProfileFailed: there is none, or it is larger than asked for.
        """
        form = self._admit(wanted)
        directory = run_directory.make_inside("tandem-profile-")
        self._end_s = self._clock() + wanted.duration_s + STOP_ALLOWANCE_S
        try:
            await self._start(directory, form, wanted)
            try:
                yield Started(form, wanted.duration_s)
                await asyncio.sleep(wanted.duration_s)
            finally:
                await self._stop()
            async with contextlib.aclosing(_sent(directory, wanted.size_bytes_max, self._prefix)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._end_s = None
            shutil.rmtree(directory, ignore_errors=True)

    def _admit(self, wanted: Wanted) -> str:
        if not self._enabled:
            raise AdminDisabled(f"this process gives no profiles: start it with {SETTING}", setting=SETTING)
        forms = self._profiler.forms
        form = wanted.form or next(iter(forms), "")
        if form not in forms:
            known = " or ".join(forms) or "none"
            raise NotSupported(f"format: profiles of this process are {known}, not {form or 'any'}", field="format")
        if self._end_s is not None:
            raise Overloaded(
                "another profile is being recorded here", retry_delay_s=max(0.1, self._end_s - self._clock())
            )
        return form

    async def _start(self, directory: Path, form: str, wanted: Wanted) -> None:
        """Start whole or not at all: what was told to begin is told to stop, also when the caller leaves in between."""
        starting = asyncio.ensure_future(self._profiler.start(directory, form, wanted))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            if starting.exception() is None:
                await self._stop()
            raise

    async def _stop(self) -> None:
        """Stop whatever becomes of the caller: a recorder that is left on slows its process down for good."""
        stopping = asyncio.ensure_future(self._profiler.stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await asyncio.wait({stopping})
            raise


async def _sent(directory: Path, size_bytes_max: int, prefix: str) -> AsyncGenerator[Part, None]:
    files = _files(directory)
    size_bytes = sum(path.stat().st_size for path in files)
    if not size_bytes:
        raise ProfileFailed("nothing was recorded")
    if size_bytes > size_bytes_max:
        raise ProfileFailed(
            f"the profile has {size_bytes} bytes, more than {size_bytes_max}: record for a shorter time",
            limit=size_bytes_max,
        )
    for path in files:
        yield ProfileFile(f"{prefix}{path.name}", path.stat().st_size)
        with path.open("rb") as opened:
            while chunk := await asyncio.to_thread(opened.read, CHUNK_BYTES):
                yield chunk


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
