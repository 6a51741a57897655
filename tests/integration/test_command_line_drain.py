"""`tandem drain`, and what it is for: a rolling restart of all workers under load that loses nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tandem.client import calls
from tandem.errors import TandemError
from tests.integration.support.calls import request_of
from tests.integration.support.command_line import TANDEM, cluster_up, line_with, run, state_of

pytestmark = pytest.mark.timeout(120)

WORKERS = ("prefill-0", "decode-0", "prefill-1", "decode-1")
CALLERS = 4
TOKENS = 60


async def ask_for_ever(frontend: str, ended: list[int], failures: list[TandemError]) -> None:
    """One caller of short and long requests, one after the other."""
    number = 0
    while True:
        number += 1
        request = request_of(f"Once {number}", max_tokens=TOKENS if number % 2 else 5)
        token_count = 0
        try:
            async for event in calls.generate(frontend, request):
                token_count += len(event.chunk.token_ids)
        except TandemError as problem:
            failures.append(problem)
        else:
            ended.append(token_count)
        await asyncio.sleep(0.02)


async def test_a_rolling_restart_of_all_workers_loses_nothing(state: Path) -> None:
    slow = json.dumps({"decode_step_s": 0.01})
    options = ("--no-edge", "--prefill", "2", "--decode", "2", "--engine-extra", slow)
    async with cluster_up(state, *options) as up:
        frontend, registry = state_of(state)["frontend"], state_of(state)["registry"]
        before = {e.worker.worker_id: e.worker.epoch for e in await calls.list_workers(registry)}
        assert set(before) == set(WORKERS)
        ended: list[int] = []
        failures: list[TandemError] = []
        callers = [asyncio.create_task(ask_for_ever(frontend, ended, failures)) for _ in range(CALLERS)]
        try:
            for worker in WORKERS:
                status, out, err = await run(*TANDEM, "drain", worker, state=state)
                assert (status, err) == (0, ""), err
                assert out.splitlines()[-1] == f"{worker}: drained, epoch {before[worker]} is deregistered"
                assert "0 open legs" in out
                await line_with(up, f"{worker} is ready again")
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)
        after = {e.worker.worker_id: e.worker.epoch for e in await calls.list_workers(registry)}
        assert set(after) == set(before)
        assert all(after[worker] > before[worker] for worker in WORKERS)
        assert not failures
        assert len(ended) > 40, "too few requests to prove anything"
        assert set(ended) == {5, TOKENS}


async def test_a_worker_that_is_not_there_is_named(state: Path) -> None:
    async with cluster_up(state, "--no-edge"):
        status, out, err = await run(*TANDEM, "drain", "decode-7", state=state)
        assert (status, out) == (1, "")
        assert err == "tandem drain: no worker decode-7 is registered (registered: decode-0, prefill-0)\n"
