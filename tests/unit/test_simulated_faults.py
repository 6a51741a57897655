"""Injected faults of the simulated engine: each fires where and when its rule says, and is recorded."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tandem.domain.generation import FinishReason
from tandem.domain.worker import EngineLoad
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.faults import ENGINE_POINTS, FaultRule, _Counter, parse_rules
from tandem.errors import ConfigError, EngineFailed, LegFailed
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tests.unit.support.simulated_engines import (
    AGGREGATED,
    DECODE,
    PREFILL,
    PROMPT,
    collect,
    expected,
    request,
    room,
    running,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def engine(model_path: Path) -> AsyncIterator[SimulatedEngine]:
    async with running(model_path, AGGREGATED, kv_capacity_tokens=256, decode_step_s=0.005) as engine:
        yield engine


def rule(point: str, kind: str, **more: Any) -> tuple[FaultRule, ...]:
    return (FaultRule(point=point, kind=kind, **more),)


def fired(engine: SimulatedEngine) -> list[tuple[str, str, int]]:
    return [(fault.point, fault.kind, fault.passed) for fault in engine.faults.fired]


def at_rest(load: EngineLoad) -> bool:
    return (load.running_requests, load.waiting_requests, load.kv_used_tokens) == (0, 0, 0)


@pytest.mark.parametrize("point", [point for point in ENGINE_POINTS if point != "abort"])
async def test_a_request_fails_at_a_point_of_the_engine(model_path: Path, engine: SimulatedEngine, point: str) -> None:
    engine.faults.replace(rule(point, "fail", nth=2))
    requests = [request(tuple(range(20 + place, 60 + place))) for place in range(2)]
    endings = await asyncio.gather(*(collect(engine, r) for r in requests), return_exceptions=True)
    broken = [ending for ending in endings if isinstance(ending, BaseException)]
    assert [type(problem) for problem in broken] == [EngineFailed]
    assert point in str(broken[0])
    assert fired(engine) == [(point, "fail", 2)]
    await assert_eventually(engine.load, at_rest)
    assert (await collect(engine, request()))[0] == expected(model_path, PROMPT, 8)


async def test_a_delay_delays(engine: SimulatedEngine) -> None:
    engine.faults.replace(rule("decode_step", "delay", nth=3, delay_s=0.2))
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    await collect(engine, request())
    assert loop.time() - begin_s >= 0.2
    assert fired(engine) == [("decode_step", "delay", 3)]


async def test_a_hang_in_the_engine_blocks_every_request_until_the_rules_change(engine: SimulatedEngine) -> None:
    engine.faults.replace(rule("decode_step", "hang", nth=2))
    legs = [asyncio.create_task(collect(engine, request(tuple(range(20 + i, 60 + i))))) for i in range(2)]
    await assert_eventually(lambda: engine.faults.fired)
    load = await engine.load()
    assert load.running_requests == 2
    assert engine.abort(request().request_id) is False
    _, pending = await asyncio.wait(legs, timeout=0.1)
    assert len(pending) == 2
    engine.faults.replace(())
    assert [finish.completion_tokens for _, finish in await asyncio.gather(*legs)] == [8, 8]


async def test_an_abort_that_is_never_carried_out_is_a_leak_that_load_shows(engine: SimulatedEngine) -> None:
    engine.faults.replace(rule("abort", "hang"))
    running_request = request(max_tokens=100)
    leg = asyncio.create_task(collect(engine, running_request))
    await assert_eventually(engine.load, lambda load: load.running_requests)
    assert engine.abort(running_request.request_id)
    assert (await leg)[1].reason is FinishReason.ABORTED
    await assert_eventually(lambda: engine.faults.fired)
    assert (await engine.load()).kv_used_tokens == 48
    engine.faults.replace(())
    await assert_eventually(engine.load, at_rest)


async def test_exhausted_memory_retracts_and_comes_back(model_path: Path, engine: SimulatedEngine) -> None:
    engine.faults.replace(rule("decode_step", "exhaust", nth=4, delay_s=0.5))
    prompts = [tuple(range(20 + place, 60 + place)) for place in range(2)]
    legs = [asyncio.create_task(collect(engine, request(prompt, max_tokens=30))) for prompt in prompts]
    load = await assert_eventually(engine.load, lambda load: load.kv_free_tokens == 0)
    assert load.kv_used_tokens == 256
    results = await asyncio.gather(*legs)
    assert [tokens for tokens, _ in results] == [expected(model_path, prompt, 30) for prompt in prompts]
    await assert_eventually(engine.load, at_rest)


async def test_memory_without_an_end_comes_back_with_other_rules(engine: SimulatedEngine) -> None:
    engine.faults.replace(rule("finish", "exhaust", nth=1))
    await collect(engine, request())
    waits = asyncio.create_task(collect(engine, request(tuple(range(30, 70)))))
    load = await assert_eventually(engine.load, lambda load: load.waiting_requests)
    assert load.kv_free_tokens == load.kv_cached_tokens == 0
    engine.faults.replace(())
    assert (await asyncio.wait_for(waits, 5))[1].completion_tokens == 8
    await assert_eventually(engine.load, at_rest)


async def test_a_crash_fails_every_request_and_is_reported_in_one_sentence(model_path: Path) -> None:
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE, decode_step_s=0.01) as decode:
        failure = asyncio.create_task(decode.wait_failed())
        where = room(prefill)
        pair = [asyncio.create_task(collect(e, request(max_tokens=100, bootstrap=where))) for e in (prefill, decode)]
        waits = asyncio.create_task(collect(decode, request(bootstrap=room(prefill))))
        await assert_eventually(decode.load, lambda load: load.running_requests and load.transferring_requests)
        decode.faults.replace(rule("decode_step", "crash"))
        assert "crashes at decode_step" in await asyncio.wait_for(failure, 2)
        for leg in (pair[1], waits):
            with pytest.raises(EngineFailed, match="crashes at decode_step"):
                await leg
        with pytest.raises(EngineFailed, match="crashes"):
            await decode.load()
        with pytest.raises(EngineFailed, match="crashes"):
            await collect(decode, request(bootstrap=where))
        await assert_eventually(prefill.load, at_rest)


async def test_a_prefill_that_crashes_in_mid_transfer_cuts_its_peer_off(model_path: Path) -> None:
    faults = {"faults": [{"point": "transfer_middle", "kind": "crash"}]}
    async with running(model_path, PREFILL, **faults) as prefill, running(model_path, DECODE) as decode:
        where = room(prefill)
        endings = await asyncio.gather(
            *(collect(e, request(bootstrap=where)) for e in (prefill, decode)), return_exceptions=True
        )
        assert [type(ending) for ending in endings] == [EngineFailed, LegFailed]
        assert "transfer_middle" in str(endings[0])
        await assert_eventually(decode.load, at_rest)


async def test_a_canary_fails(model_path: Path) -> None:
    for role in (AGGREGATED, PREFILL, DECODE):
        async with running(model_path, role, faults=[{"point": "canary", "kind": "fail", "nth": 2}]) as engine:
            await engine.canary()
            with pytest.raises(EngineFailed, match="canary"):
                await engine.canary()
            await assert_eventually(engine.load, at_rest)


def test_when_a_rule_fires() -> None:
    def passes(**more: Any) -> list[int]:
        counter = _Counter(FaultRule(point="admit", kind="fail", **more), "seed")
        return [passed for passed in range(1, 9) if counter.due()]

    assert passes() == list(range(1, 9))
    assert passes(nth=3) == [3]
    assert passes(nth=3, times=2) == [3, 4]
    assert passes(times=2) == [1, 2]
    assert passes(every=3) == [3, 6]
    assert passes(every=3, nth=1) == [1, 4, 7]
    assert passes(every=2, nth=5) == [5, 7]
    assert passes(every=2, times=3) == [2, 4, 6]
    assert passes(every=1) == passes()
    assert set(passes(every=2, chance=0.5)) < {2, 4, 6, 8}
    assert passes(chance=0.0) == []
    some = passes(chance=0.5)
    assert some == passes(chance=0.5)
    assert 0 < len(some) < 8
    assert len(passes(chance=0.5, times=1)) == 1


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ([3], "faults[0]"),
        ([{"point": "admit"}], "faults[0]"),
        ([{"point": "admit", "kind": "fail", "when": 1}], "faults[0]"),
        ([{"point": "lunch", "kind": "fail"}], "faults[0].point"),
        ([{"point": "admit", "kind": "fall"}], "faults[0].kind"),
        ([{"point": "admit", "kind": "fail"}, {"point": "admit", "kind": "fail", "nth": 0}], "faults[1].nth"),
        ([{"point": "admit", "kind": "fail", "times": True}], "faults[0].times"),
        ([{"point": "admit", "kind": "fail", "every": 0}], "faults[0].every"),
        ([{"point": "admit", "kind": "fail", "every": 2.0}], "faults[0].every"),
        ([{"point": "admit", "kind": "fail", "chance": 2}], "faults[0].chance"),
        ([{"point": "admit", "kind": "delay"}], "faults[0].delay_s"),
        ([{"point": "admit", "kind": "delay", "delay_s": -1}], "faults[0].delay_s"),
        ("admit", "faults"),
    ],
)
def test_wrong_rules_are_named(wrong: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(wrong, "faults")
    assert caught.value.key == key


async def test_the_control_file_is_followed_and_what_fired_is_written_beside_it(
    model_path: Path, tmp_path: Path
) -> None:
    control = tmp_path / "faults.json"
    async with running(model_path, AGGREGATED, control_file=str(control), decode_step_s=0.005) as engine:
        await collect(engine, request())
        control.write_text(json.dumps([{"point": "decode_step", "kind": "hang"}]))
        stuck = request()
        leg = asyncio.create_task(collect(engine, stuck))
        log = tmp_path / "faults.json.fired"
        await assert_eventually(log.exists)
        line = json.loads(log.read_text())
        assert (line["point"], line["kind"], line["request_id"]) == ("decode_step", "hang", stuck.request_id)
        control.write_text("[]")
        assert (await asyncio.wait_for(leg, 2))[1].completion_tokens == 8
        control.write_text(json.dumps([{"point": "lunch", "kind": "hang"}]))
        assert "must be one of" in await asyncio.wait_for(engine.wait_failed(), 2)


PROGRAM = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.support.simulated_engines import AGGREGATED, collect, request, running

async def main():
    async with running(Path(sys.argv[2]), AGGREGATED, faults=[{"point": "finish", "kind": "kill"}]) as engine:
        await collect(engine, request())

asyncio.run(main())
"""


def test_a_kill_is_one(model_path: Path) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2]), str(model_path)]
    assert subprocess.run(arguments, timeout=30).returncode == -signal.SIGKILL
