"""Profiles of this process on request: bounded in time and size, one at a time, and only if enabled by a setting.

Owns the limits, the order (record, stop, send, delete) and the files. A `Profiler` records: Python in `cpu_profile.py`,
an engine in `tandem.worker.app`. Independent of gRPC.
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
"""Time to write the files, included in the retry delay given to concurrent callers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A profile request with validated limits."""

    duration_s: float
    size_bytes_max: int
    steps_max: int
    """Engines only: recording ends early after so many steps."""
    with_stack: bool
    form: str | None
    """One of the profiler's formats; None: its first."""


@dataclass(frozen=True, slots=True)
class Started:
    """Recording has started."""

    form: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """Header of a file; its bytes follow."""

    name: str
    size_bytes: int


Part = Started | ProfileFile | bytes


class Recording(Protocol):
    """A profile that is being recorded."""

    async def stop(self) -> None:
        """Stop recording and write the files to the directory. Called once.

        Raises:
            TandemError: no profile was recorded.
        """
        ...


class Profiler(Protocol):
    """Records one profile at a time."""

    forms: tuple[str, ...]
    """Names in ProfileFormat without its prefix, in lower case; the first is the default."""

    async def start(self, directory: Path, form: str, wanted: Wanted) -> Recording:
        """Start recording.

        Raises:
            TandemError: recording cannot start.
        """
        ...


class Profiles:
    """The profiles of one process."""

    def __init__(
        self, profiler: Profiler, *, enabled: bool, clock: Clock = monotonic, process: int | None = None
    ) -> None:
        """`process`: number of this process, the prefix of its file names; None: the only process."""
        self._prefix = "" if process is None else f"{process}-"
        self._profiler = profiler
        self._enabled = enabled
        self._clock = clock
        self._end_s: float | None = None
        """When the present recording ends, on `clock`; None: none is running."""

    async def capture(self, wanted: Wanted) -> AsyncGenerator[Part, None]:
        """Record, then yield the files; closing the generator early stops and discards the recording.

        Raises:
            AdminDisabled: profiles are disabled in this process.
            NotSupported: the format, or profiling of this engine, is not supported.
            Overloaded: another profile is being recorded.
            ProfileFailed: nothing was recorded, or more than `size_bytes_max`.
        """
        form = self._admit(wanted)
        directory = run_directory.make_inside("tandem-profile-")
        self._end_s = self._clock() + wanted.duration_s + STOP_ALLOWANCE_S
        try:
            recording = await self._start(directory, form, wanted)
            try:
                yield Started(form, wanted.duration_s)
                await asyncio.sleep(wanted.duration_s)
            finally:
                await _stop(recording)
            async with contextlib.aclosing(_sent(directory, wanted.size_bytes_max, self._prefix)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._end_s = None
            shutil.rmtree(directory, ignore_errors=True)

    def _admit(self, wanted: Wanted) -> str:
        if not self._enabled:
            raise AdminDisabled(
                f"profiles are disabled: start the process with {SETTING}, or the cluster with `tandem up --admin`",
                setting=SETTING,
            )
        forms = self._profiler.forms
        form = wanted.form or next(iter(forms), "")
        if form not in forms:
            known = " or ".join(forms) or "none"
            raise NotSupported(f"format: this process supports {known}, not {form or 'any'}", field="format")
        if self._end_s is not None:
            raise Overloaded(
                "another profile is being recorded by this process", retry_delay_s=max(0.1, self._end_s - self._clock())
            )
        return form

    async def _start(self, directory: Path, form: str, wanted: Wanted) -> Recording:
        """Start completely or not at all: a caller that cancels meanwhile must not leave a recorder running."""
        starting = asyncio.ensure_future(self._profiler.start(directory, form, wanted))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            if starting.exception() is None:
                await _stop(starting.result())
            raise


async def _stop(recording: Recording) -> None:
    """Stop even if the caller is cancelled: a recorder left running would slow the process down."""
    stopping = asyncio.ensure_future(recording.stop())
    try:
        await asyncio.shield(stopping)
    except asyncio.CancelledError:
        await asyncio.wait({stopping})
        raise


async def _sent(directory: Path, size_bytes_max: int, prefix: str) -> AsyncGenerator[Part, None]:
    files = _files(directory)
    size_bytes = sum(path.stat().st_size for path in files)
    if not size_bytes:
        raise ProfileFailed(
            "nothing was recorded: the profiler wrote no file; record for longer, or while requests run"
        )
    if size_bytes > size_bytes_max:
        raise ProfileFailed(
            f"the profile has {size_bytes} bytes, the limit is {size_bytes_max}: record for a shorter time",
            limit=size_bytes_max,
        )
    for path in files:
        yield ProfileFile(f"{prefix}{path.name}", path.stat().st_size)
        with path.open("rb") as opened:
            while chunk := await asyncio.to_thread(opened.read, CHUNK_BYTES):
                yield chunk


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
