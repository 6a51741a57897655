"""Faults inside the engines of a cluster of processes, by their control files: each has happened, and nothing leaks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tandem.client import calls
from tandem.errors import LegFailed
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import generate, refusal, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


def flags(role: str, directory: Path) -> dict[str, str]:
    return {"engine-extra": json.dumps({"decode_step_s": 0.002, "control_file": str(directory / role)})}


def inject(role: str, directory: Path, *rules: dict[str, Any]) -> None:
    draft = directory / f"{role}.draft"
    draft.write_text(json.dumps(rules))
    os.replace(draft, directory / role)


def fired(role: str, directory: Path) -> list[tuple[str, str]]:
    lines = (directory / f"{role}.fired").read_text().splitlines()
    return [(line["point"], line["kind"]) for line in map(json.loads, lines)]


async def assert_whole(cluster: LocalCluster) -> None:
    """Every page of every worker is free or cached: what the workers themselves report."""

    async def unaccounted() -> list[int]:
        loads = [await calls.worker_load(worker.address) for worker in cluster.workers]
        return [load.kv_used_tokens for load in loads] + [
            load.kv_capacity_tokens - load.kv_used_tokens - load.kv_cached_tokens - load.kv_free_tokens
            for load in loads
        ]

    await assert_eventually(unaccounted, lambda tokens: not any(tokens), what="memory that adds up")


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("point", ["bootstrap", "transfer_begin", "transfer_middle", "transfer_end"])
async def test_a_hand_over_that_breaks_leaves_nothing(tmp_path: Path, role: str, point: str) -> None:
    role_flags = {name: flags(name, tmp_path) for name in ("prefill", "decode")}
    async with running(tmp_path, engine="simulated", role_flags=role_flags) as cluster:
        before = (await generate(cluster, request_of("Once"))).token_ids
        inject(role, tmp_path, {"point": point, "kind": "fail", "nth": 1})
        problem = await refusal(cluster, request_of("Once"))
        assert isinstance(problem, LegFailed), problem
        assert fired(role, tmp_path) == [(point, "fail")]
        await assert_whole(cluster)
        assert (await generate(cluster, request_of("Once"))).token_ids == before


async def test_an_engine_that_kills_its_process_in_mid_transfer(tmp_path: Path) -> None:
    role_flags = {name: flags(name, tmp_path) for name in ("prefill", "decode")}
    async with running(tmp_path, engine="simulated", role_flags=role_flags) as cluster:
        inject("prefill", tmp_path, {"point": "transfer_middle", "kind": "kill", "nth": 1})
        assert isinstance(await refusal(cluster, request_of("Once")), LegFailed)
        assert await cluster.process("prefill-0").wait_ended() == -signal.SIGKILL
        assert fired("prefill", tmp_path) == [("transfer_middle", "kill")]

        async def held() -> int:
            return (await calls.worker_load(cluster.process("decode-0").address)).kv_used_tokens

        await assert_eventually(held, lambda tokens: tokens == 0)


async def test_a_worker_whose_engine_crashes_ends(tmp_path: Path) -> None:
    role_flags = {name: flags(name, tmp_path) for name in ("prefill", "decode")}
    async with running(tmp_path, engine="simulated", role_flags=role_flags) as cluster:
        inject("decode", tmp_path, {"point": "decode_step", "kind": "crash", "nth": 3})
        await refusal(cluster, request_of("Once"))
        assert await cluster.process("decode-0").wait_ended() == 1
        assert "crashes at decode_step" in (cluster.process("decode-0").last_words() or "")
