"""How long cancelled prompts delay the next one: `python -m benchmarks.cancelled_prefill`.

Head-of-line blocking at prefill. A prefill worker that runs one request at a time gets a number of long prompts; all
are cancelled before their first token, and a short prompt is sent at once. Its time to first token is compared with
that on an idle worker and with that behind the same prompts when they are not cancelled. Prompts are random tokens, so
that the prefix cache has none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually

MODEL = Path("models") / "tandem-demo"
LONG_TOKENS, SHORT_TOKENS = 1_800, 16
SIMULATED = {"prefill_tokens_per_s": 2_000.0, "chunked_prefill_tokens": 256}
"""0.9 s for a long prompt, in eight steps."""
BEFORE_CANCEL_S = 0.3
"""From the last prompt to the cancel: all have reached the frontend, and the first one is being computed."""


class Bench:
    """One cluster of a pair."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self._address = cluster.frontend.address
        self._workers = [worker.address for worker in cluster.workers]
        self._draw = random.Random(seed)

    async def first_token_s(self, prompt_tokens: int) -> float:
        """Time to the first token of a new prompt."""
        ids = [self._draw.randrange(6, 1536) for _ in range(prompt_tokens)]
        request = pb.GenerateRequest(
            token_ids={"ids": ids},  # type: ignore[arg-type]
            sampling={"temperature": 0.0},  # type: ignore[arg-type]
            stopping={"max_tokens": 2, "ignore_eos": True},  # type: ignore[arg-type]
        )
        begin_s = time.perf_counter()
        found_s = 0.0
        async for event in calls.generate(self._address, request, 120.0):
            if event.HasField("chunk") and not found_s:
                found_s = time.perf_counter() - begin_s
        return found_s

    @asynccontextmanager
    async def long_prompts(self, count: int) -> AsyncIterator[list[asyncio.Task[float]]]:
        """So many prompts on their way."""
        tasks = [asyncio.create_task(self.first_token_s(LONG_TOKENS)) for _ in range(count)]
        try:
            await asyncio.sleep(BEFORE_CANCEL_S)
            yield tasks
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._idle()

    async def behind(self, count: int, *, cancel: bool) -> float:
        """Time to first token of a short prompt behind long ones, which are cancelled first or not."""
        async with self.long_prompts(count) as tasks:
            assert not all(task.done() for task in tasks), "the long prompts are too short for this machine"
            if cancel:
                for task in tasks:
                    task.cancel()
            return await self.first_token_s(SHORT_TOKENS)

    async def _idle(self) -> None:
        async def held() -> int:
            loads = [await calls.worker_load(address) for address in self._workers]
            return sum(load.running_requests + load.waiting_requests + load.transferring_requests for load in loads)

        await assert_eventually(held, lambda count: count == 0, within_s=60, what="idle engines")


async def measure(engine: str, count: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by case."""
    flags = {"prefill": {"running-requests-max": "1"}}
    worker = {"engine-extra": json.dumps(SIMULATED)} if engine == "simulated" else {"dtype": "float32"}
    found: dict[str, list[float]] = {"idle": [], "cancelled": [], "not cancelled": []}
    with tempfile.TemporaryDirectory() as logs:
        spec = ClusterSpec(model=MODEL, engine=engine, log_directory=Path(logs), worker_flags=worker, role_flags=flags)
        async with LocalCluster(spec) as cluster:
            bench = Bench(cluster, seed)
            await bench.first_token_s(SHORT_TOKENS)
            await bench.first_token_s(LONG_TOKENS)
            for number in range(rounds):
                found["idle"].append(1e3 * await bench.first_token_s(SHORT_TOKENS))
                found["cancelled"].append(1e3 * await bench.behind(count, cancel=True))
                found["not cancelled"].append(1e3 * await bench.behind(count, cancel=False))
                print(f"round {number + 1}: " + ", ".join(f"{name} {ms[-1]:.0f} ms" for name, ms in found.items()))
    return found


def main() -> int:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("simulated", "sglang"), default="simulated")
    parser.add_argument("--prompts", type=int, default=10, help="long prompts that are cancelled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        found = asyncio.run(measure(given.engine, given.prompts, given.rounds, given.seed))
        for name, ms in found.items():
            print(f"{name:<14} median {statistics.median(ms):7.0f} ms   worst {max(ms):7.0f} ms")
        return 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
