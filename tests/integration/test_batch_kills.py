"""Frontends that are killed while they run a batch: each row is once in the output, without help from outside."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tests.integration.support.batch_calls import assert_each_row_once, chat_rows, created, ended, sdk, spec, until

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

ROWS = 400
SLOW = {"decode_step_s": 0.01}


def completed(batch: Batch) -> int:
    """Rows that the batch says have a result."""
    return batch.request_counts.completed if batch.request_counts is not None else 0


async def in_the_middle(client: AsyncOpenAI, batch: Batch, least: int) -> int:
    """Wait until so many rows have a result. Returns how many have; the batch has not ended."""
    now = await until(client, batch, lambda now: completed(now) >= least)
    assert now.status == "in_progress", "the batch has ended before its frontend was killed"
    return completed(now)


def leader_of(cluster: LocalCluster, directory: Path) -> ClusterProcess:
    """The frontend that holds the lock of the batch directory, as the kernel says."""
    inode = (directory / "batches" / "runner.lock").stat().st_ino
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    pids = {int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5].endswith(f":{inode}")}
    (leader,) = [frontend for frontend in cluster.frontends if frontend.pid in pids]
    return leader


def journals(directory: Path) -> int:
    """Processes that have run rows of the one batch, which has not ended."""
    return len(list((directory / "batches").glob("batches/*/*/journal-*")))


async def test_a_batch_on_a_frontend_that_is_killed_twice_has_each_row_once(tmp_path: Path) -> None:
    async with LocalCluster(spec(tmp_path, engine=SLOW)) as cluster:
        assert cluster.edge is not None
        async with sdk(cluster.edge.address).with_options(max_retries=10) as client:
            batch = await created(client, chat_rows(ROWS))
            done = 0
            for kills in (1, 2):
                done = await in_the_middle(client, batch, done + 40)
                cluster.frontend.signal(signal.SIGKILL)
                assert await cluster.frontend.wait_ended() != 0
                assert journals(tmp_path) == kills
                await cluster.restart("frontend")
            await assert_each_row_once(client, await ended(client, batch), ROWS)


async def test_another_frontend_goes_on_with_a_batch_whose_frontend_is_killed(tmp_path: Path) -> None:
    async with LocalCluster(spec(tmp_path, engine=SLOW, frontends=2)) as cluster:
        assert cluster.edge is not None
        async with sdk(cluster.edge.address).with_options(max_retries=10) as client:
            batch = await created(client, chat_rows(ROWS))
            await in_the_middle(client, batch, 40)
            leader = leader_of(cluster, tmp_path)
            leader.signal(signal.SIGKILL)
            assert await leader.wait_ended() != 0
            done = await ended(client, batch)
            # It was not restarted: the other one has run the rest.
            assert not leader.runs
            await assert_each_row_once(client, done, ROWS)


async def test_a_frontend_that_drains_leaves_its_batch_to_another(tmp_path: Path) -> None:
    async with LocalCluster(spec(tmp_path, engine=SLOW, frontends=2)) as cluster:
        assert cluster.edge is not None
        async with sdk(cluster.edge.address).with_options(max_retries=10) as client:
            batch = await created(client, chat_rows(ROWS))
            await in_the_middle(client, batch, 40)
            leader = leader_of(cluster, tmp_path)
            assert await leader.stop() == 0
            await assert_each_row_once(client, await ended(client, batch), ROWS)
