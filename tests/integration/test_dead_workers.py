"""Dead and frozen workers under load while no registry reports them: the frontend detects them itself."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import Stream
from tests.integration.support.steady_load import CLIENTS, under_load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

PAIRS = {"engine": "simulated", "prefill": 2, "decode": 2, "worker_flags": SIMULATED}
NOTICED_S = 1.0


def decoders(streams: list[Stream]) -> set[str]:
    return {stream.finish.route.decode_worker_id for stream in streams}


async def kill_registry(cluster: LocalCluster) -> None:
    cluster.registry.kill()
    await cluster.registry.wait_ended()


async def test_nothing_is_sent_to_a_dead_worker_though_the_registry_is_dead_too(tmp_path: Path) -> None:
    async with running(tmp_path, **PAIRS) as cluster, under_load(cluster) as load:
        await load.wait_streams(20)
        await kill_registry(cluster)
        await load.wait_streams(20)
        assert not load.failures
        killed = cluster.process("decode-1")
        killed.signal(signal.SIGKILL)
        await killed.wait_ended()
        killed_s = time.monotonic()
        # Refusals alone are forgotten after a second, again and again.
        await asyncio.sleep(NOTICED_S + 4)
        late = load.since(killed_s + NOTICED_S)
        assert len(late) > 50
        assert decoders(late) == {"decode-0"}
        assert {stream.finish.route.attempt for stream in late} == {1}, "a leg was sent to the dead worker"
        assert len(load.failures) <= CLIENTS, "more than it can have held"


async def test_a_frozen_worker_gets_no_request_until_it_goes_on(tmp_path: Path) -> None:
    # Frozen for less than a lease: it stays the worker that the frontend knows.
    flags = {"registry": {"lease-ttl-s": "20"}}
    async with running(tmp_path, **PAIRS, role_flags=flags) as cluster, under_load(cluster) as load:
        await load.wait_streams(20)
        await kill_registry(cluster)
        frozen = cluster.process("decode-1")
        frozen.signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        # A leg that meets it takes a second to go elsewhere, and is forgotten after another one.
        await asyncio.sleep(6)
        late = load.since(frozen_s + 1.5)
        assert len(late) > 20
        assert decoders(late) == {"decode-0"}
        assert {stream.finish.route.attempt for stream in late} == {1}
        assert not load.failures
        frozen.signal(signal.SIGCONT)
        await load.wait_streams(300)
        assert not load.failures, "what the worker held went on"
        assert "decode-1" in decoders(load.streams[-100:])
