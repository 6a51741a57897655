"""Stopping a profile during a stall: the stop is sent, and completes once the stall is over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang.engine import SglangEngine


async def test_a_recording_is_stopped_although_the_engine_stalls(tmp_path: Path) -> None:
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def stop_profile() -> None:
        asked.set()
        await goes_on.wait()

    engine = SglangEngine(EngineSettings(role=WorkerRole.PREFILL, model_path=tmp_path, model_name="m"))
    engine._engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(stop_profile=stop_profile))
    engine._profile_directory = tmp_path
    engine._stall = "it is stopped"
    stopping = asyncio.create_task(engine.stop_profile())
    await asyncio.wait_for(asked.wait(), 1)
    goes_on.set()
    await stopping
