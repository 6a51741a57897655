"""A recorder is stopped when the caller cancels, and released when anything fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tandem.observability.profiles import Profiles, Wanted
from tandem.service import run_directory

WANTED = Wanted(duration_s=5, size_bytes_max=10**6, steps_max=10, with_stack=False, form=None)


class Recorder:
    """Takes a moment to start, as an engine in another process does."""

    forms: tuple[str, ...] = ("speedscope",)

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.stop_count = 0

    async def start(self, directory: Path, form: str, wanted: Wanted) -> Recorder:
        self.started.set()
        await asyncio.sleep(0.05)
        return self

    async def stop(self) -> None:
        self.stop_count += 1


async def begun(profiles: Profiles) -> None:
    async for _ in profiles.capture(WANTED):
        pass


async def test_a_caller_that_cancels_during_start_leaves_no_recorder_running() -> None:
    recorder = Recorder()
    profiles = Profiles(recorder, enabled=True)
    caller = asyncio.create_task(begun(profiles))
    await recorder.started.wait()
    caller.cancel()
    await asyncio.wait({caller})
    assert recorder.stop_count == 1


async def test_a_full_disk_is_not_a_recording_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = Profiles(Recorder(), enabled=True)

    def full(prefix: str) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_directory, "make_inside", full)
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            await begun(profiles)
