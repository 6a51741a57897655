"""A frontend whose own place in the registry is refused serves all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

from played_registry import PlayedRegistry, play_registry
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig

from tandem.errors import InvalidRequest, ServiceError
from tandem.rpc import clients
from tandem.testing.eventually import assert_eventually

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"


async def test_one_without_a_name_is_called_after_its_address() -> None:
    registry = PlayedRegistry()
    async with play_registry(registry):
        app = FrontendApp(FrontendConfig(registry=(registry.address,), model=MODEL))
        try:
            await app.start()
            await assert_eventually(lambda: registry.registered)
            assert registry.registered[0][1] == f"frontend-{app.address.replace(':', '-')}"
        finally:
            await app.stop()


async def test_it_serves_before_and_without_being_registered() -> None:
    registry = PlayedRegistry()
    errors = iter([ServiceError("not now"), InvalidRequest("frontend.address", "is no address")])
    registry.register_error = lambda member_id, epoch: next(errors, ServiceError("not now"))
    async with play_registry(registry):
        app = FrontendApp(FrontendConfig(registry=(registry.address,), model=MODEL, drain_settle_s=0))
        try:
            async with asyncio.timeout(10):
                await app.start()
            assert await clients.is_serving(app.address)
            await assert_eventually(lambda: len(registry.registered) >= 2)
            assert await clients.is_serving(app.address)
            async with asyncio.timeout(1):
                assert await app.drain()
        finally:
            await app.stop()
