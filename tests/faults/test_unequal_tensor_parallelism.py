"""Pairs of TP 2 and TP 1 on the real engine, in both directions: tokens of one engine, and exact bytes.

`test_frontend_pools.py` compares the rule with every pair; here the engines prove that what it allows works.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.generation import KvCheck
from tandem.domain.worker import WorkerRole, incompatible_field
from tandem.engine.settings import EngineSettings
from tests.contract.support.engine_process import EngineProcess
from tests.contract.support.fleet import Pair, prompt_of, request_of

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
LENGTHS = (1, 5, 17, 100, 600)
NEW_TOKENS = 12

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.fault_matrix,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(600),
]


Wanted = tuple[WorkerRole, dict[str, Any]]
"""Role of an engine, and further arguments of SGLang."""


@asynccontextmanager
async def started(folder: Path, *wanted: Wanted) -> AsyncIterator[list[EngineProcess]]:
    """Engines of the demo model, started at the same time."""
    engines: list[EngineProcess] = []
    try:
        for role, extra in wanted:
            settings = EngineSettings(
                role=role, model_path=MODEL, model_name="demo", device="cpu", dtype="float32", kv_capacity_tokens=4096,
                extra=extra,
            )  # fmt: skip
            engines.append(await EngineProcess.spawn("sglang", settings, folder / f"{role.value}.log"))
        await asyncio.gather(*(engine.start() for engine in engines))
        yield engines
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Greedy tokens of one aggregated engine."""

    async def tokens() -> dict[int, list[int]]:
        async with started(tmp_path_factory.mktemp("logs"), (WorkerRole.AGGREGATED, {})) as (engine,):
            size = engine.capabilities.vocabulary_size
            requests = {length: request_of(prompt_of(length, size), NEW_TOKENS) for length in LENGTHS}
            return {length: (await engine.generate(requests[length]).all()).token_ids for length in LENGTHS}

    return asyncio.run(tokens())


@pytest.mark.parametrize(("prefill_tp", "decode_tp", "page"), [(2, 1, 1), (1, 2, 16)], ids=["2-to-1", "1-to-2"])
async def test_pair_of_unequal_tp_has_the_tokens_of_one_engine_and_moves_every_byte_once(
    prefill_tp: int, decode_tp: int, page: int, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    wanted = [
        (role, {"tp_size": size, "page_size": page})
        for role, size in ((WorkerRole.PREFILL, prefill_tp), (WorkerRole.DECODE, decode_tp))
    ]
    async with started(tmp_path, *wanted) as (first, second):
        pair = Pair(first, second)
        about = second.capabilities
        assert incompatible_field(first.capabilities, about) is None
        assert first.capabilities.kv_bytes_per_token == about.kv_bytes_per_token
        for length in LENGTHS:
            computed, streamed = await pair.run(prompt_of(length, about.vocabulary_size), NEW_TOKENS)
            assert streamed.token_ids == expected[length], length
            assert streamed.finish.recomputed_tokens == 0
            assert streamed.finish.kv_check is KvCheck.UNCHECKED, "the ranks' digests cover other parts of the KV"
            whole_tokens = -(-length // page) * page
            for leg in (computed, streamed):
                assert leg.finish.timings is not None
                assert leg.finish.timings.kv_transfer_bytes == whole_tokens * about.kv_bytes_per_token, length
        together = await asyncio.gather(
            *(pair.run(prompt_of(length, about.vocabulary_size), NEW_TOKENS) for length in LENGTHS)
        )
        assert [legs[1].token_ids for legs in together] == [expected[length] for length in LENGTHS]
        assert {legs[1].finish.kv_check for legs in together} == {KvCheck.UNCHECKED}
        await pair.assert_idle()
