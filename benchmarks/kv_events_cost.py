"""What following an engine's KV events costs: CPU of SGLang's processes and of the worker's, with events and without.

Two engines of the same settings answer the same prompts in turn, so that both see the same machine. A prompt is fresh
each time, so each of its pages is one new block. CPU time, not wall time: it does not depend on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tests.contract.support.engine_process import EngineProcess
from tests.contract.support.fleet import prompt_of, request_of

MODEL = Path(".cache/models/tiny-random-float32")
LOG = Path(".cache/kv-events-cost.log")


@dataclass
class Side:
    """One engine and what it took."""

    engine: EngineProcess
    wall_ms: list[float]
    scheduler_ms: list[float]
    host_ms: list[float]

    async def ask(self, prompt: tuple[int, ...]) -> None:
        """One prompt, one token."""
        host = psutil.Process(self.engine.process.pid)
        (scheduler,) = [child for child in host.children(recursive=True) if "scheduler" in child.name()]
        before = [_cpu_ms(scheduler), _cpu_ms(host)]
        begin = time.perf_counter()
        await self.engine.generate(request_of(prompt, 1)).all()
        self.wall_ms.append((time.perf_counter() - begin) * 1e3)
        # Events follow the response.
        await asyncio.sleep(0.1)
        self.scheduler_ms.append(_cpu_ms(scheduler) - before[0])
        self.host_ms.append(_cpu_ms(host) - before[1])

    def row(self) -> str:
        """Means in milliseconds a prompt."""
        means = (statistics.fmean(values) for values in (self.wall_ms, self.scheduler_ms, self.host_ms))
        return " | ".join(f"{value:.1f}" for value in means)


def _cpu_ms(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system) * 1e3


async def _open(page: int, *, kv_events: bool) -> Side:
    settings = EngineSettings(
        role=WorkerRole.AGGREGATED,
        model_path=MODEL,
        model_name="m",
        device="cpu",
        dtype="float32",
        kv_capacity_tokens=65_536,
        kv_events=kv_events,
        extra={"page_size": page},
    )
    engine = await EngineProcess.spawn("sglang", settings, LOG)
    await engine.start()
    return Side(engine, [], [], [])


async def measure(page: int, prompts: int, tokens: int) -> None:
    """Print a row with events and one without."""
    sides = {state: await _open(page, kv_events=state) for state in (True, False)}
    try:
        for seed in range(prompts + 3):
            for side in sides.values():
                await side.ask(prompt_of(tokens, side.engine.capabilities.vocabulary_size, seed=seed))
        for state, side in sides.items():
            # The first ones warm up.
            for values in (side.wall_ms, side.scheduler_ms, side.host_ms):
                del values[:3]
            print(f"| {page} | {'on' if state else 'off'} | {side.row()} |", flush=True)
    finally:
        await asyncio.gather(*(side.engine.close() for side in sides.values()))


def main() -> None:
    """Parse the flags and measure each page size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", default="16,1")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2_000)
    given = parser.parse_args()
    print("| page | events | wall ms | scheduler CPU ms | worker CPU ms |\n|---|---|---|---|---|")
    for page in given.pages.split(","):
        asyncio.run(measure(int(page), given.prompts, given.tokens))


if __name__ == "__main__":
    main()
