"""The takeover steps of a GPU run, on simulated engines: what they report is what happened."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import running
from tools.gpu import takeovers
from tools.gpu.takeovers import Takeover

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

VOCABULARY_SIZE = 1536
STEP = {"engine-extra": json.dumps({"decode_step_s": 0.01})}
STREAMS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_pairs(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs: Path = tmp_path_factory.mktemp("takeovers")
    async with running(logs, prefill=2, decode=2, engine="simulated", worker_flags=STEP) as cluster:
        yield cluster


async def test_a_killed_decode_worker_costs_its_streams_a_pause_and_no_token(two_pairs: LocalCluster) -> None:
    work = Takeover(streams=STREAMS, prompt_tokens=32, new_tokens=150, at_token=3)
    found = await takeovers.kill_one(two_pairs, "decode", work, VOCABULARY_SIZE)
    assert (found["killed"], found["exit_status"]) == ("decode-0", -9)
    assert (found["streams"], found["lost"], found["whole"]) == (STREAMS, 0, STREAMS)
    assert found["went_on"] == found["on_the_victim"] >= 1
    assert found["went_on_after_ms"]["max"] > 0
    assert found["tokens"]["streams_equal"] == found["undisturbed_twice"]["streams_equal"] == STREAMS
    assert found["after_restart"]["whole"] == STREAMS


async def test_a_kill_that_comes_too_late_is_no_measurement(two_pairs: LocalCluster) -> None:
    work = Takeover(streams=1, prompt_tokens=8, new_tokens=2, at_token=9)
    with pytest.raises(RuntimeError, match="never came to the moment of the kill"):
        await takeovers.kill_one(two_pairs, "decode", work, VOCABULARY_SIZE)
    assert all(worker.runs for worker in two_pairs.workers)


async def test_a_rolling_restart_reports_each_worker_and_loses_no_stream(two_pairs: LocalCluster) -> None:
    work = Takeover(streams=2, prompt_tokens=16, new_tokens=20, at_token=0)
    found = await takeovers.roll(two_pairs, work, VOCABULARY_SIZE)
    assert {name: worker["exit_status"] for name, worker in found["workers"].items()} == dict.fromkeys(
        ("prefill-0", "prefill-1", "decode-0", "decode-1"), 0
    )
    assert found["streams"] > 2 * work.streams, "void: the callers did nothing meanwhile"
    assert (found["lost"], found["whole"]) == (0, found["streams"])
    assert found["tokens"]["streams_equal"] == found["streams"]
    assert found["next_request"]["failure"] is None
