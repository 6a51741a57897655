"""What is said of an engine's health under every kind of trouble."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tandem.engine.port import BootstrapAddress, Engine
from tandem.errors import EngineFailed
from tandem.testing.eventually import assert_eventually
from tandem.worker.engine_health import EngineHealth, Periods


class PlayedEngine:
    """Answers its canary as it is told."""

    def __init__(self) -> None:
        self.answers: Callable[[], Any] = lambda: None
        self.stall: str | None = None
        self.bootstrap: BootstrapAddress | None = None
        self.canary_count = 0
        self.is_hanging = False

    def stalled(self) -> str | None:
        return self.stall

    def bootstrap_address(self) -> BootstrapAddress | None:
        return self.bootstrap

    async def canary(self) -> None:
        self.canary_count += 1
        if self.is_hanging:
            await asyncio.sleep(60)
        self.answers()


@contextlib.asynccontextmanager
async def watched(engine: PlayedEngine, proof_s: float = 0.1) -> AsyncIterator[SimpleNamespace]:
    scene = SimpleNamespace(batches=0, told=[])

    async def tell(trouble: str | None) -> None:
        scene.told.append(trouble)

    periods = Periods(proof_s=proof_s, canary_s=0.2)
    health = scene.health = EngineHealth(cast("Engine", engine), lambda: scene.batches, periods, tell)
    task = asyncio.create_task(health.watch())
    try:
        yield scene
    finally:
        assert not task.done(), task.result()
        task.cancel()


async def said(scene: SimpleNamespace, text: str | None) -> None:
    async def trouble() -> str | None:
        return cast("str | None", scene.health.trouble)

    def fits(now: str | None) -> bool:
        return now is None if text is None else now is not None and text in now

    await assert_eventually(trouble, fits, within_s=3, every_s=0.02, what=f"trouble {text!r}")


async def test_an_idle_engine_proves_itself_by_canaries() -> None:
    engine = PlayedEngine()
    async with watched(engine) as scene:
        await asyncio.sleep(0.5)
        assert engine.canary_count >= 2
        assert scene.told == []


async def test_tokens_are_proof_enough() -> None:
    engine = PlayedEngine()
    async with watched(engine, proof_s=0.3) as scene:
        for _ in range(40):
            scene.batches += 1
            await asyncio.sleep(0.02)
        assert engine.canary_count == 0


async def test_an_engine_that_hangs_is_not_serving_until_it_answers_again() -> None:
    engine = PlayedEngine()
    engine.is_hanging = True
    async with watched(engine) as scene:
        await said(scene, "not answered a canary within 0.2 s")
        engine.is_hanging = False
        await said(scene, None)


async def test_an_engine_that_fails_its_canary_is_not_serving() -> None:
    engine = PlayedEngine()

    def fail() -> None:
        raise EngineFailed("no token came")

    engine.answers = fail
    async with watched(engine) as scene:
        await said(scene, "failed a canary: no token came")


async def test_a_stall_is_told_at_once_and_ends_with_a_canary() -> None:
    engine = PlayedEngine()
    async with watched(engine, proof_s=1.0) as scene:
        engine.stall = "the scheduler is stopped"
        await said(scene, "the scheduler is stopped")
        engine.is_hanging, engine.stall = True, None
        await said(scene, "not answered a canary")
        engine.is_hanging = False
        await said(scene, None)
        assert engine.canary_count >= 2


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]"])
async def test_a_bootstrap_server_that_is_gone_is_told(host: str) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    engine = PlayedEngine()
    engine.bootstrap = BootstrapAddress(host=host, port=server.sockets[0].getsockname()[1])
    async with watched(engine, proof_s=0.5) as scene:
        await asyncio.sleep(0.6)
        assert scene.told == []
        server.close()
        await server.wait_closed()
        await said(scene, "bootstrap server at")
