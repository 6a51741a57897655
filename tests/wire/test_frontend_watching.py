"""An edge's watch of the registry's frontends, over a socket: what it receives, and what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from tandem.discovery.watches import FrontendWatch
from tandem.domain.worker import WorkerState
from tandem.testing.eventually import assert_eventually
from tests.wire.support.publishing_registry import publishing


@contextlib.asynccontextmanager
async def watching(*addresses: str, confirm_grace_s: float = 10) -> AsyncIterator[FrontendWatch]:
    watch = FrontendWatch(addresses, confirm_grace_s=confirm_grace_s)
    await watch.start()
    try:
        yield watch
    finally:
        await watch.close()


async def until(watch: FrontendWatch, *addresses: str) -> None:
    def known() -> tuple[str, ...]:
        return tuple(frontend.address for frontend in watch.frontends())

    await assert_eventually(known, lambda seen: seen == addresses, what=f"frontends {addresses}")


async def test_every_change_is_reported_and_wakes() -> None:
    async with publishing() as (registry, address), watching(address) as watch:
        change = watch.next_change
        registry.publish("a:1", "b:1")
        await asyncio.wait_for(change.wait(), 5)
        await until(watch, "a:1", "b:1")
        assert watch.state.is_live
        registry.publish("b:1", draining=("b:1",))
        await until(watch, "b:1")
        assert [frontend.state for frontend in watch.frontends()] == [WorkerState.DRAINING]


async def test_frontends_outlive_their_registry_and_follow_the_next() -> None:
    async with publishing("r1") as (registry, address):
        port = int(address.rpartition(":")[2])
        watcher = watching(address, confirm_grace_s=1)
        watch = await watcher.__aenter__()
        registry.publish("a:1", "b:1")
        await until(watch, "a:1", "b:1")
    try:
        await assert_eventually(lambda: watch.state.is_live, lambda live: not live, what="the outage")
        await until(watch, "a:1", "b:1")
        async with publishing("r2", port) as (registry, _):
            # Empty, as a registry is that has just begun: nothing of it is believed.
            await assert_eventually(lambda: watch.state.is_live, what="the next registry")
            await until(watch, "a:1", "b:1")
            registry.publish("b:1", "c:1")
            await until(watch, "a:1", "b:1", "c:1")
            await until(watch, "b:1", "c:1")  # after its time
    finally:
        await watcher.__aexit__(None, None, None)


async def test_a_registry_that_refuses_or_is_gone_gives_the_next_its_turn() -> None:
    async with publishing("r1") as (first, address), publishing("r1") as (second, other):
        first.refuses = True
        second.publish("a:1")
        async with watching("127.0.0.1:1", address, other) as watch:
            await until(watch, "a:1")
            assert second.watchers == 1


async def test_a_frozen_registry_gives_the_next_its_turn() -> None:
    """It accepts connections and answers nothing, as a process does that was stopped by a signal."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        async with (
            publishing() as (registry, address),
            watching(f"127.0.0.1:{frozen.getsockname()[1]}", address) as watch,
        ):
            registry.publish("a:1")
            await until(watch, "a:1")


async def test_a_closed_watch_leaves_nothing_and_keeps_its_view() -> None:
    async with publishing() as (registry, address):
        async with watching(address) as watch:
            registry.publish("a:1")
            await until(watch, "a:1")
        await watch.close()
        await until(watch, "a:1")
        await assert_eventually(lambda: registry.watchers, lambda count: count == 0, what="the end of its stream")
