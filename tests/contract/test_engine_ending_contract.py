"""How an aggregated engine ends: stopped before it started, killed from outside, stopped twice."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tandem.domain.generation import FinishReason
from tests.contract.support.fleet import Fleet, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]


async def test_stop_before_start(fleet: Fleet) -> None:
    engine = await fleet.unstarted()
    try:
        await engine.stop()
        await engine.stop()
    finally:
        await engine.close()


async def test_wait_failed_is_silent_while_the_engine_lives(fleet: Fleet) -> None:
    engine = await fleet.aggregated()
    _, answers = engine.send("wait_failed")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(answers.get(), timeout=0.5)


async def test_wait_failed_reports_a_killed_child(fleet: Fleet) -> None:
    engine = await fleet.aggregated()
    children = await engine.children()
    if not children:
        assert fleet.name == "simulated", "an engine without child processes cannot lose one"
        pytest.skip("this engine has no process of its own that could be killed")
    _, answers = engine.send("wait_failed")
    scheduler = next((pid for pid, name in children if "scheduler" in name), children[0][0])
    os.kill(scheduler, signal.SIGKILL)
    try:
        kind, sentence = await asyncio.wait_for(answers.get(), timeout=5)
        assert kind == "result", sentence
        assert sentence
        assert "\n" not in sentence
    finally:
        await fleet.close()


async def test_stop_ends_what_runs_and_may_come_twice(fleet: Fleet) -> None:
    engine = await fleet.aggregated()
    try:
        generation = engine.generate(request_of(prompt_of(40, engine.capabilities.vocabulary_size), 1000))
        await generation.tokens(2)
        async with asyncio.timeout(10):
            await engine.stop()
            await engine.stop()
            result = await generation.all()
        assert result.finish.reason is FinishReason.ABORTED
        assert await engine.children() == []
    finally:
        await fleet.close()
