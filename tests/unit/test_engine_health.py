"""Engine health reported for each kind of failure."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tandem.engine.port import BootstrapAddress, Engine
from tandem.errors import EngineFailed
from tandem.testing.eventually import assert_eventually
from tandem.testing.virtual_time import run_virtually
from tandem.worker.engine_health import EngineHealth, Periods


class ScriptedEngine:
    """An engine whose canary result each test sets."""

    def __init__(self) -> None:
        self.answers: Callable[[], Any] = lambda: None
        self.stall: str | None = None
        self.handover: str | None = None
        self.bootstrap: BootstrapAddress | None = None
        self.canary_count = 0
        self.is_hanging = False

    def stalled(self) -> str | None:
        return self.stall

    def handover_trouble(self) -> str | None:
        return self.handover

    def bootstrap_address(self) -> BootstrapAddress | None:
        return self.bootstrap

    async def canary(self) -> None:
        self.canary_count += 1
        if self.is_hanging:
            await asyncio.sleep(60)
        self.answers()


@contextlib.asynccontextmanager
async def watched(engine: ScriptedEngine, proof_s: float = 0.1) -> AsyncIterator[SimpleNamespace]:
    scene = SimpleNamespace(batches=0, reported=[])

    async def report(trouble: str | None) -> None:
        scene.reported.append(trouble)

    periods = Periods(proof_s=proof_s, canary_s=0.2)
    clock = asyncio.get_running_loop().time
    health = scene.health = EngineHealth(cast("Engine", engine), lambda: scene.batches, periods, report, clock)
    task = asyncio.create_task(health.watch())
    try:
        yield scene
    finally:
        assert not task.done(), task.result()
        task.cancel()


def virtually(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test on virtual time: its periods pass in no time, however busy the machine is."""

    @functools.wraps(test)
    def run() -> None:
        run_virtually(test())

    return run


async def reported(scene: SimpleNamespace, text: str | None) -> None:
    async def trouble() -> str | None:
        return cast("str | None", scene.health.trouble)

    def fits(now: str | None) -> bool:
        return now is None if text is None else now is not None and text in now

    await assert_eventually(trouble, fits, within_s=3, every_s=0.02, what=f"trouble {text!r}")


@virtually
async def test_an_idle_engine_runs_canaries() -> None:
    engine = ScriptedEngine()
    async with watched(engine) as scene:
        await asyncio.sleep(0.5)
        assert engine.canary_count >= 2
        assert scene.reported == []


@virtually
async def test_no_canary_runs_while_tokens_come() -> None:
    engine = ScriptedEngine()
    async with watched(engine, proof_s=0.3) as scene:
        for _ in range(40):
            scene.batches += 1
            await asyncio.sleep(0.02)
        assert engine.canary_count == 0


@virtually
async def test_an_engine_that_hangs_is_not_serving_until_it_answers_again() -> None:
    engine = ScriptedEngine()
    engine.is_hanging = True
    async with watched(engine) as scene:
        await reported(scene, "canary timed out after 0.2 s")
        engine.is_hanging = False
        await reported(scene, None)


@virtually
async def test_an_engine_that_fails_its_canary_is_not_serving() -> None:
    engine = ScriptedEngine()

    def fail() -> None:
        raise EngineFailed("no token came")

    engine.answers = fail
    async with watched(engine) as scene:
        await reported(scene, "canary failed: no token came")


@virtually
async def test_a_stall_is_reported_at_once_and_ends_with_a_canary() -> None:
    engine = ScriptedEngine()
    async with watched(engine, proof_s=1.0) as scene:
        engine.stall = "the scheduler is stopped"
        await reported(scene, "the scheduler is stopped")
        engine.is_hanging, engine.stall = True, None
        await reported(scene, "canary timed out")
        engine.is_hanging = False
        await reported(scene, None)
        assert engine.canary_count >= 2


@virtually
async def test_an_engine_that_cannot_hand_over_is_not_serving() -> None:
    engine = ScriptedEngine()
    async with watched(engine, proof_s=1.0) as scene:
        engine.handover = "the engine has read no message"
        await reported(scene, "the engine has read no message")
        engine.handover = None
        await reported(scene, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]"])
async def test_an_unreachable_bootstrap_server_is_reported(host: str) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    engine = ScriptedEngine()
    engine.bootstrap = BootstrapAddress(host=host, port=server.sockets[0].getsockname()[1])
    async with watched(engine, proof_s=0.5) as scene:
        await asyncio.sleep(0.6)
        assert scene.reported == []
        server.close()
        await server.wait_closed()
        await reported(scene, "is unreachable")
