"""Workers that crash, come back, or are started twice, under a load of small requests on simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.steady_load import CLIENTS, under_load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


async def test_only_the_streams_a_killed_worker_held_fail(tmp_path: Path) -> None:
    pairs = {"prefill": 2, "decode": 2}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, **pairs) as cluster:
        killed = cluster.process("decode-1")
        killed.flags["port"] = killed.address.rpartition(":")[2]
        async with under_load(cluster) as load:
            await load.wait_streams(20)
            assert not load.failures
            killed.signal(signal.SIGKILL)
            await killed.wait_ended()
            # Its lease runs for 5 s more: half of all requests are sent to a worker that is gone.
            await load.wait_streams(150)
            assert len(load.failures) <= CLIENTS, "more than it can have held"
            assert not [problem for problem in load.failures if problem.metadata["phase"] == "dispatched"], (
                load.failures
            )
            second = [stream for stream in load.streams if stream.finish.route.attempt > 1]
            assert second, "no request met the dead worker"
            assert {stream.finish.route.decode_worker_id for stream in second} == {"decode-0"}
            load.failures.clear()
            await cluster.restart("decode-1")
            await load.wait_streams(100)
            assert not load.failures
            assert "decode-1" in {stream.finish.route.decode_worker_id for stream in load.streams[-60:]}


async def test_a_worker_that_is_back_at_its_address_is_used_at_once(tmp_path: Path) -> None:
    """Also the only one there is: its new start gets a connection that knows nothing of former refusals."""
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED) as cluster:
        decode = cluster.process("decode-0")
        decode.flags["port"] = decode.address.rpartition(":")[2]
        for _ in range(3):
            decode.signal(signal.SIGKILL)
            await decode.wait_ended()
            for _ in range(5):
                # Each refusal makes gRPC wait longer before it tries again, up to a second.
                with pytest.raises(TandemError):
                    await generate(cluster, request_of("Once"))
                await asyncio.sleep(0.2)
            await cluster.restart("decode-0")
            # For the word of it to reach the frontend, far less than gRPC would wait.
            await asyncio.sleep(0.3)
            assert len((await generate(cluster, request_of("Once"))).token_ids) == 16


async def test_a_worker_without_a_name_is_found(tmp_path: Path) -> None:
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED) as cluster:
        nameless = cluster.process("decode-0")
        await nameless.stop()
        del nameless.flags["worker-id"]
        await cluster.restart("decode-0")
        ids = [entry.worker.worker_id for entry in await calls.list_workers(cluster.registry.address)]
        assert f"decode-{nameless.address.replace(':', '-')}" in ids


@contextlib.asynccontextmanager
async def second_start(cluster: LocalCluster, name: str, logs: Path) -> AsyncIterator[ClusterProcess]:
    """Another process with the settings of one that is there, at an address of its own."""
    first = cluster.process(name)
    second = ClusterProcess(f"{name}-second", first.role, dict(first.flags), logs)
    await second.start(logs)
    try:
        yield second
    finally:
        await second.stop()


async def test_a_second_process_with_the_name_of_a_live_one_ends(tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": "1"}}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, role_flags=flags) as cluster:
        async with under_load(cluster) as load, second_start(cluster, "decode-0", tmp_path) as second:
            assert await asyncio.wait_for(second.wait_ended(), 20) == 1
            assert "another live process has this worker's id or address" in (second.last_words() or "")
            assert f"at {cluster.process('decode-0').address}" in (second.last_words() or "")
            await load.wait_streams(10)
            assert not load.failures
        assert cluster.process("decode-0").exit_status is None


async def test_a_worker_whose_place_was_taken_finishes_its_streams_and_ends(tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": "1"}}
    slow = {"engine-extra": '{"decode_step_s": 0.02}'}
    async with running(tmp_path, engine="simulated", worker_flags=slow, role_flags=flags) as cluster:
        first = cluster.process("decode-0")
        stream = asyncio.create_task(generate(cluster, request_of("Once", max_tokens=300)))

        async def open_legs() -> int:
            return (await calls.worker_load(first.address)).open_legs

        await assert_eventually(open_legs, bool, within_s=5, what="an open leg")
        # Frozen for longer than its lease, as a machine that swaps may be.
        first.signal(signal.SIGSTOP)
        async with second_start(cluster, "decode-0", tmp_path) as second:
            await asyncio.wait_for(second.wait_ready(), 20)
            first.signal(signal.SIGCONT)
            assert len((await stream).token_ids) == 300
            assert await asyncio.wait_for(first.wait_ended(), 10) == 1
            assert "replaced by a newer start" in (first.last_words() or "")
            assert len((await generate(cluster, request_of("Once"))).token_ids) == 16
