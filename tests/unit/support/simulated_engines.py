"""Simulated engines in the test's own process, and requests to them; shared by the tests of the simulated engine."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.generation import Bootstrap, EngineFinish, EngineRequest, Sampling, Stopping
from tandem.domain.worker import WorkerRole
from tandem.engine.pulling import generate
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary

AGGREGATED, PREFILL, DECODE = WorkerRole.AGGREGATED, WorkerRole.PREFILL, WorkerRole.DECODE
PROMPT = tuple(range(20, 60))
SETTINGS = ("kv_capacity_tokens", "kv_check_share", "transfer_backend", "dtype")
"""Those of `EngineSettings` among the options."""
_numbers = itertools.count(1)


@asynccontextmanager
async def running(model_path: Path, role: WorkerRole, **options: Any) -> AsyncIterator[SimulatedEngine]:
    settings = {k: options.pop(k) for k in SETTINGS if k in options}
    engine = SimulatedEngine(
        EngineSettings(role=role, model_path=model_path, model_name="m", extra=options, **settings)
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(
    prompt: tuple[int, ...] = PROMPT, max_tokens: int = 8, bootstrap: Bootstrap | None = None, **stopping: Any
) -> EngineRequest:
    return EngineRequest(
        request_id=f"r{next(_numbers):05d}",
        token_ids=prompt,
        sampling=Sampling(),
        stopping=Stopping(max_tokens=max_tokens, **stopping),
        bootstrap=bootstrap,
    )


def room(prefill: SimulatedEngine) -> Bootstrap:
    address = prefill.bootstrap_address()
    assert address is not None
    return Bootstrap(host=address.host, port=address.port, room=next(_numbers))


async def collect(engine: SimulatedEngine, what: EngineRequest) -> tuple[list[int], EngineFinish]:
    tokens: list[int] = []
    finish = None
    async for batch in generate(engine, what):
        tokens += batch.token_ids
        finish = batch.finish
    assert finish is not None
    return tokens, finish


def expected(model_path: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    return expected_tokens(read_vocabulary(read_checkpoint(model_path)), prompt, count)
