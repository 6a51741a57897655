"""What a batch costs live traffic, and what kills cost a batch: `python -m benchmarks.batches`.

Starts a simulated aggregated worker whose steps slow down with each running request, a frontend and an edge. Live
clients stream one request after the other; phases without and with a running batch alternate. Prints the time between
tokens of the live streams in each, and the rows that the batch completed meanwhile and while nothing else ran.

`--kills 2 --rows 10000` instead runs one batch over a frontend that is killed so often, and compares its output with
its input, row by row. `--per-live 100` shows what rows cost without a low priority.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tests.integration.support.batch_calls import chat_rows, created, ended, results, sdk, spec, until

STEP_S, REQUEST_S = 0.010, 0.005
ENGINE = {"decode_step_s": STEP_S, "decode_request_s": REQUEST_S, "prefill_tokens_per_s": 100_000}
WORKER = {"running-requests-max": "64"}
LIVE_TOKENS, ROW_TOKENS = 60, 40
SETTLE_S = 2.0
"""From the beginning of a phase to its first measurement: rows that ran alone have stopped by then."""


@dataclass
class Phase:
    """What live streams met."""

    gaps_s: list[float] = field(default_factory=list)
    rows: int = 0
    """Rows that the batch completed meanwhile."""
    seconds: float = 0.0

    def line(self) -> str:
        """For people."""
        ordered = sorted(self.gaps_s)
        p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
        mean = statistics.fmean(ordered)
        return (
            f"ITL mean {mean * 1e3:6.1f} ms, median {p50 * 1e3:6.1f} ms, p99 {p99 * 1e3:6.1f} ms, "
            f"{len(ordered):6d} tokens, {self.rows / self.seconds:5.1f} rows/s"
        )


async def live_stream(stub: Any, end_s: float, from_s: float, gaps_s: list[float]) -> None:
    """One client: streams requests until `end_s`, and notes the gaps between tokens from `from_s` on."""
    number = 0
    while time.monotonic() < end_s:
        number += 1
        request = pb.GenerateRequest(prompt=f"Story {number}", stopping={"max_tokens": LIVE_TOKENS, "ignore_eos": True})
        last_s: float | None = None
        async for event in stub.Generate(request):
            if event.HasField("chunk"):
                now_s, count = time.monotonic(), len(event.chunk.token_ids)
                if last_s is not None and count and from_s <= now_s <= end_s:
                    gaps_s += [(now_s - last_s) / count] * count
                last_s = now_s


async def phase(stub: Any, client: AsyncOpenAI, batch: Batch | None, live: int, seconds: float) -> Phase:
    """Live streams for so long, beside a batch or without one."""
    found = Phase(seconds=seconds)
    begin_s = time.monotonic()
    streams = [
        asyncio.create_task(live_stream(stub, begin_s + SETTLE_S + seconds, begin_s + SETTLE_S, found.gaps_s))
        for _ in range(live)
    ]
    await asyncio.sleep(SETTLE_S)
    before = await completed(client, batch)
    await asyncio.sleep(seconds)
    found.rows = await completed(client, batch) - before
    await asyncio.gather(*streams)
    return found


async def completed(client: AsyncOpenAI, batch: Batch | None) -> int:
    """Rows of a batch that have a result."""
    if batch is None:
        return 0
    counts = (await client.batches.retrieve(batch.id)).request_counts
    return 0 if counts is None else counts.completed


async def measure(options: argparse.Namespace, directory: Path) -> None:
    """Alternate phases without and with a batch, for each number of live streams."""
    flags = {"batch-rows-per-live-request": str(options.per_live)}
    async with LocalCluster(spec(directory, engine=ENGINE, frontend=flags, worker=WORKER)) as cluster:
        assert cluster.edge is not None
        async with sdk(cluster.edge.address) as client, open_channel(cluster.frontend.address) as channel:
            stub: Any = InferenceServiceStub(channel)
            for live in options.live:
                quiet, beside = Phase(), Phase()
                for _ in range(options.rounds):
                    add(quiet, await phase(stub, client, None, live, options.seconds))
                    batch = await created(client, chat_rows(20_000, max_tokens=ROW_TOKENS))
                    await until(client, batch, lambda now: bool(now.request_counts and now.request_counts.completed))
                    add(beside, await phase(stub, client, batch, live, options.seconds))
                    await client.batches.cancel(batch.id)
                    await ended(client, batch, 120)
                ratio = statistics.fmean(beside.gaps_s) / statistics.fmean(quiet.gaps_s)
                print(f"{live} live streams, without a batch: {quiet.line()}")
                print(f"{live} live streams, with a batch:    {beside.line()}: mean {100 * (ratio - 1):+.1f} %")
            await alone(client, options.seconds)


def add(total: Phase, one: Phase) -> None:
    """Add a phase to those of its kind."""
    total.gaps_s += one.gaps_s
    total.rows += one.rows
    total.seconds += one.seconds


async def alone(client: AsyncOpenAI, seconds: float) -> None:
    """Rows per second while nothing else runs: twice as long, because many rows at a time take long."""
    batch = await created(client, chat_rows(20_000, max_tokens=ROW_TOKENS))
    await until(client, batch, lambda now: bool(now.request_counts and now.request_counts.completed >= 64))
    before = await completed(client, batch)
    await asyncio.sleep(2 * seconds)
    print(f"no live stream: {(await completed(client, batch) - before) / (2 * seconds):.1f} rows/s")
    await client.batches.cancel(batch.id)
    await ended(client, batch, 120)


async def kill(options: argparse.Namespace, directory: Path) -> None:
    """Run one batch over a frontend that is killed, and compare its output with its input."""
    async with LocalCluster(spec(directory, engine={"decode_step_s": 0.002})) as cluster:
        assert cluster.edge is not None
        async with sdk(cluster.edge.address).with_options(max_retries=20) as client:
            begin_s = time.monotonic()
            batch = await created(client, chat_rows(options.rows, max_tokens=4))
            for number in range(1, options.kills + 1):
                least = number * options.rows // (options.kills + 1)
                now = await until(
                    client,
                    batch,
                    lambda now, least=least: now.request_counts.completed >= least,  # type: ignore[misc]
                    within_s=600,
                )
                cluster.frontend.signal(signal.SIGKILL)
                await cluster.frontend.wait_ended()
                print(f"killed the frontend at {now.request_counts} after {time.monotonic() - begin_s:.1f} s")
                await cluster.restart("frontend")
            done = await ended(client, batch, 600)
            seconds = time.monotonic() - begin_s
            lines = await results(client, done.output_file_id)
            found = Counter(line["custom_id"] for line in lines)
            is_right = found == Counter(f"row-{number}" for number in range(options.rows))
            print(f"{done.status} after {seconds:.1f} s: {len(lines)} lines, {len(found)} different rows")
            print(f"error file: {done.error_file_id}; each of {options.rows} rows once: {'yes' if is_right else 'NO'}")


async def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=json.loads, default=[2, 10, 20], help="numbers of live streams, as a JSON list")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a phase")
    parser.add_argument("--rounds", type=int, default=2, help="phases of each kind")
    parser.add_argument("--per-live", type=float, default=0.08, help="batch_rows_per_live_request")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the batch that is killed")
    parser.add_argument("--kills", type=int, default=0, help="kill the frontend so often, and measure nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tb") as directory:
        await (kill if options.kills else measure)(options, Path(directory))


if __name__ == "__main__":
    asyncio.run(main())
