"""Workers that are stopped and go on, as by SIGSTOP, a machine that swaps, or one that is suspended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.client import calls
from tandem.errors import StaleEpoch
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.direct_legs import direct_legs
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

SLOW = {"engine-extra": '{"decode_step_s": 0.02}'}


@asynccontextmanager
async def stopped(process: ClusterProcess) -> AsyncIterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        seen = psutil.Process(process.pid)
        await assert_eventually(seen.status, lambda status: status == psutil.STATUS_STOPPED, what="a stopped process")
        yield
    finally:
        process.signal(signal.SIGCONT)


async def listed(cluster: LocalCluster) -> dict[str, registry_pb.ListedWorker]:
    return {entry.worker.worker_id: entry for entry in await calls.list_workers(cluster.registry.address)}


async def epoch_of(cluster: LocalCluster, worker_id: str) -> int:
    entry = (await listed(cluster)).get(worker_id)
    return entry.worker.epoch if entry is not None else 0


async def open_legs(process: ClusterProcess) -> int:
    return (await calls.worker_load(process.address)).open_legs


def leg_for(epoch: int, model: str) -> leg_pb2.LegRequest:
    return leg_pb2.LegRequest(
        request_id="sent-while-it-slept",
        attempt=1,
        worker_epoch=epoch,
        model=model,
        token_ids=[1, 2, 3],
        stopping=sampling_pb2.Stopping(max_tokens=4),
        bootstrap=leg_pb2.Bootstrap(host="127.0.0.1", port=1, room=1),
    )


async def test_what_was_sent_to_a_worker_that_slept_past_its_lease_is_refused(tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": "1"}}
    async with running(tmp_path, engine="simulated", worker_flags=SLOW, role_flags=flags) as cluster:
        decode = cluster.process("decode-0")
        before = await calls.worker_at(decode.address)
        stream = asyncio.create_task(generate(cluster, request_of("Once", max_tokens=150)))
        await assert_eventually(lambda: open_legs(decode), bool, what="an open leg")
        # Its step stream is open before: no client can connect to a process that is stopped.
        async with direct_legs(decode.address) as legs:
            async with stopped(decode):
                waiting = asyncio.create_task(legs.start(leg_for(before.epoch, before.capabilities.model)))
                await assert_eventually(
                    lambda: listed(cluster), lambda known: "decode-0" not in known, what="a lost lease"
                )
                assert not waiting.done(), "a process that is stopped has answered"
            with pytest.raises(StaleEpoch):
                await waiting
        await assert_eventually(lambda: epoch_of(cluster, "decode-0"), lambda epoch: epoch > before.epoch)
        assert len((await stream).token_ids) == 150, "a leg that was open belongs to its caller, who still waits"
        stream_again = await assert_eventually(lambda: generate(cluster, request_of("Once")))
        assert stream_again.finish.route.decode_worker_id == "decode-0"
        assert decode.exit_status is None


async def test_a_pause_shorter_than_the_lease_is_nothing(tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": "6"}}
    async with running(tmp_path, engine="simulated", worker_flags=SLOW, role_flags=flags) as cluster:
        decode, before = cluster.process("decode-0"), await epoch_of(cluster, "decode-0")
        stream = asyncio.create_task(generate(cluster, request_of("Once", max_tokens=150)))
        await assert_eventually(lambda: open_legs(decode), bool, what="an open leg")
        async with stopped(decode):
            await asyncio.sleep(1)
        assert len((await stream).token_ids) == 150
        assert await epoch_of(cluster, "decode-0") == before
        assert len((await generate(cluster, request_of("Once"))).token_ids) == 16


async def test_an_outage_of_the_registry_changes_no_epoch(tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": "1"}}
    async with running(tmp_path, engine="simulated", worker_flags=SLOW, role_flags=flags) as cluster:
        before = await epoch_of(cluster, "decode-0")
        cluster.registry.kill()
        await cluster.registry.wait_ended()
        await asyncio.sleep(2.5)
        assert len((await generate(cluster, request_of("Once"))).token_ids) == 16
        await cluster.restart("registry")
        await assert_eventually(lambda: epoch_of(cluster, "decode-0"), bool, within_s=10)
        assert await epoch_of(cluster, "decode-0") == before
