"""ProfileService over gRPC, with the profiler of frontends: what is in a profile, who gets none, and what ends one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1.admin_service_pb2_grpc import ProfileServiceStub, add_ProfileServiceServicer_to_server
from tandem.client import admin_calls
from tandem.errors import AdminDisabled, InvalidRequest, NotSupported, Overloaded, ProfileFailed
from tandem.observability.cpu_profile import CpuProfiler, CpuRecording
from tandem.observability.profiles import Profiles, Wanted
from tandem.rpc.channels import open_channel
from tandem.rpc.profile_servicer import SERVICE_NAME, ProfileServicer
from tandem.service import run_directory
from tandem.testing.eventually import assert_eventually


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files of profiles are while they are sent."""
    monkeypatch.setenv(run_directory.VARIABLE, str(tmp_path))
    return tmp_path


class WatchedProfiler(CpuProfiler):
    """Keeps what it has started."""

    def __init__(self) -> None:
        self.recordings: list[CpuRecording] = []

    async def start(self, directory: Path, form: str, wanted: Wanted) -> CpuRecording:
        recording = await super().start(directory, form, wanted)
        self.recordings.append(recording)
        return recording

    @property
    def is_recording(self) -> bool:
        return any(recording._recorder.is_running for recording in self.recordings)


@asynccontextmanager
async def serving(server_type: Any, *, enabled: bool = True) -> AsyncIterator[tuple[str, WatchedProfiler]]:
    profiler = WatchedProfiler()
    servicer = ProfileServicer(Profiles(profiler, enabled=enabled))
    server = server_type([(SERVICE_NAME, partial(add_ProfileServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.port}", profiler
    finally:
        await server.stop(0)


async def captured(address: str, **fields: Any) -> dict[str, bytes]:
    request = pb.CaptureProfileRequest(**{"duration_ms": 300, **fields})
    return {name: data async for name, data in admin_calls.capture_profile(address, request)}


def spin_here(count: int) -> int:
    return sum(number * number for number in range(count))


@asynccontextmanager
async def busy() -> AsyncIterator[None]:
    async def work() -> None:
        while True:
            spin_here(20_000)
            await asyncio.sleep(0)

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()


async def test_a_profile_shows_what_the_loop_did(server_type: Any, run: Path) -> None:
    async with serving(server_type) as (address, _), busy():
        files = await captured(address)
        assert list(files) == ["profile.speedscope.json"]
        profile = json.loads(files["profile.speedscope.json"])
        assert "spin_here" in {frame["name"] for frame in profile["shared"]["frames"]}
        files = await captured(address, format=pb.PROFILE_FORMAT_HTML)
        assert list(files) == ["profile.html"]
        assert b"spin_here" in files["profile.html"]
        assert files["profile.html"].startswith(b"<!DOCTYPE html>")
    assert not list(run.iterdir())


async def test_without_the_setting_there_is_none(server_type: Any) -> None:
    async with serving(server_type, enabled=False) as (address, profiler):
        with pytest.raises(AdminDisabled) as refusal:
            await captured(address)
        assert refusal.value.metadata == {"setting": "admin_enabled"}
        assert not profiler.recordings


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"duration_ms": 99}, "duration_ms"),
        ({"duration_ms": 60_001}, "duration_ms"),
        ({"size_bytes_max": 2**28 + 1}, "size_bytes_max"),
        ({"size_bytes_max": 0}, "size_bytes_max"),
        ({"steps_max": 0}, "steps_max"),
        ({"steps_max": 10_001}, "steps_max"),
        ({"format": 77}, "format"),
    ],
)
async def test_a_field_out_of_bounds_is_named(server_type: Any, fields: dict[str, int], field: str) -> None:
    async with serving(server_type) as (address, _):
        with pytest.raises(InvalidRequest) as refusal:
            await captured(address, **fields)
        assert refusal.value.field == field


async def test_a_form_of_others_is_not_supported(server_type: Any) -> None:
    async with serving(server_type) as (address, _):
        with pytest.raises(NotSupported, match="speedscope or html, not chrome_trace"):
            await captured(address, format=pb.PROFILE_FORMAT_CHROME_TRACE)


async def test_one_at_a_time(server_type: Any) -> None:
    async with serving(server_type) as (address, _):
        first = asyncio.create_task(captured(address, duration_ms=500))
        await asyncio.sleep(0.2)
        with pytest.raises(Overloaded) as refusal:
            await captured(address)
        assert 0.1 <= (refusal.value.retry_delay_s or 0) <= 2.5
        assert await first
        assert await captured(address, duration_ms=100)


async def test_a_caller_that_leaves_ends_the_recording(server_type: Any, run: Path) -> None:
    async with serving(server_type) as (address, profiler):
        async with open_channel(address) as channel:
            stub: Any = ProfileServiceStub(channel)
            call = stub.CaptureProfile(pb.CaptureProfileRequest(duration_ms=60_000))
            assert (await call.read()).started.duration_ms == 60_000
            assert profiler.is_recording
            call.cancel()

        async def left() -> list[Path]:
            return list(run.iterdir())

        await assert_eventually(left, lambda found: not found, within_s=5, what="the end of the recording")
        assert not profiler.is_recording
        assert await captured(address, duration_ms=100)


async def test_a_profile_that_is_too_large_is_not_sent(server_type: Any, run: Path) -> None:
    async with serving(server_type) as (address, _), busy():
        with pytest.raises(ProfileFailed) as failure:
            await captured(address, size_bytes_max=1024, format=pb.PROFILE_FORMAT_HTML)
        assert failure.value.metadata["limit"] == "1024"
    assert not list(run.iterdir())
