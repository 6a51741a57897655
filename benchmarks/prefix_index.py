"""Memory and CPU time of a frontend's index of cached blocks: `python -m benchmarks.prefix_index`

A million blocks of 8, 64 and 500 workers; lookups of prompts of 100,000 tokens; snapshots applied on an event loop
whose longest pause is measured; and the alternatives that were not taken. Each size runs in a process of its own, for
its memory. Measures the thread's CPU time of lookups and wall time of snapshots.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.client.kv_feed import KvFeed
from tandem.domain.kv_blocks import HASH_RULE
from tandem.domain.worker import Start, Worker, WorkerRole
from tests.unit.support.frontend_workers import worker

BLOCKS = 1_000_000
PAGE_TOKENS = 16
PROMPT_TOKENS = 100_001
PART_BLOCKS = 65_536
HOLDERS = (1, 8, 64, 500)
REPEATS = 30
SIZES = (
    "8 workers, all blocks each",
    "64 workers, an eighth each",
    "500 workers, 2,000 of their own each",
    "500 workers, a hundredth each",
)


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def starts(count: int) -> list[Start]:
    """So many workers."""
    return [(f"prefill-{number}", 1) for number in range(count)]


def random_hashes(count: int, seed: int = 1) -> array[int]:
    """Hashes of blocks that no prompt here has."""
    rng = random.Random(seed)
    return array("q", (rng.getrandbits(64) - 2**63 for _ in range(count)))


def fill(index: PrefixIndex, start: Start, hashes: array[int]) -> None:
    """Load a cache, as a feed does."""
    index.reset(start, PAGE_TOKENS)
    for begin in range(0, len(hashes), 1_024):
        index.add(start, hashes[begin : begin + 1_024].tolist())
    index.complete(start)


def filled(size: str) -> PrefixIndex:
    """A million blocks, spread as the size says."""
    index, hashes, rng = PrefixIndex(4 * BLOCKS), random_hashes(BLOCKS), random.Random(2)
    if size == SIZES[0]:
        for start in starts(8):
            fill(index, start, hashes)
    elif size == SIZES[1]:
        for start in starts(64):
            fill(index, start, array("q", rng.sample(hashes, BLOCKS // 8)))
    elif size == SIZES[3]:
        for start in starts(500):
            fill(index, start, array("q", rng.sample(hashes, BLOCKS // 100)))
    else:
        for number, start in enumerate(starts(500)):
            fill(index, start, hashes[2_000 * number : 2_000 * (number + 1)])
    return index


def cpu_ms(act: Callable[[], object]) -> tuple[float, float, float]:
    """Least, median and greatest of `REPEATS` runs that do the same: the greatest shows what else the machine did."""
    taken = []
    for _ in range(REPEATS):
        begin_ns = time.thread_time_ns()
        act()
        taken.append((time.thread_time_ns() - begin_ns) / 1e6)
    return min(taken), statistics.median(taken), max(taken)


def lookups(index: PrefixIndex) -> dict[str, Any]:
    """Times of lookups, hashing not counted, and of hashing."""
    rng, found = random.Random(3), dict[str, Any]()
    tokens = [rng.randrange(128_000) for _ in range(PROMPT_TOKENS)]
    hashes = PromptBlocks(tokens).hashes(PAGE_TOKENS, PROMPT_TOKENS // PAGE_TOKENS)

    def hashed() -> PromptBlocks:
        prompt = PromptBlocks(tokens)
        prompt.hashes(PAGE_TOKENS, len(hashes))
        return prompt

    prompt = hashed()
    for name, depth in (("whole prompt", lambda _: len(hashes)), ("own depths", lambda _: rng.randrange(len(hashes)))):
        for count in HOLDERS:
            for number, start in enumerate(starts(count)):
                fill(index, ("at-" + start[0], 1), array("q", hashes[: depth(number)]))
            found[f"{name}, {count}"] = cpu_ms(lambda: index.match(prompt))
            for start in starts(count):
                index.drop(("at-" + start[0], 1))
            while index.sweep():
                pass
    found["cached nowhere, with hashing"] = cpu_ms(lambda: index.match(PromptBlocks(tokens)))
    found["hashing all 6,250 blocks"] = cpu_ms(hashed)
    return found


async def on_loop(work: Any) -> tuple[float, float, float]:
    """Seconds of wall time and of CPU time that `work` takes, and the longest CPU time in ms for which nothing else ran
    on the loop: other processes on the machine do not lengthen it.
    """
    worst_ns, running = 0, True

    async def look() -> None:
        nonlocal worst_ns
        last_ns = time.thread_time_ns()
        while running:
            await asyncio.sleep(0)
            now_ns = time.thread_time_ns()
            worst_ns, last_ns = max(worst_ns, now_ns - last_ns), now_ns

    watcher = asyncio.create_task(look())
    await asyncio.sleep(0)
    begin_s, begin_ns = time.perf_counter(), time.thread_time_ns()
    await work
    taken_s, cpu_s = time.perf_counter() - begin_s, (time.thread_time_ns() - begin_ns) / 1e9
    running = False
    await watcher
    return taken_s, cpu_s, worst_ns / 1e6


def snapshot_messages(of: Worker, hashes: array[int]) -> list[bytes]:
    """As they come over the wire."""
    cache = pb.KvCacheDescription(
        epoch=of.epoch, block_size_tokens=PAGE_TOKENS, hash_rule=HASH_RULE, blocks=len(hashes)
    )
    messages = [pb.WatchKvEventsResponse(cache=cache)]
    for begin in range(0, len(hashes), PART_BLOCKS):
        part = hashes[begin : begin + PART_BLOCKS]
        last = begin + PART_BLOCKS >= len(hashes)
        messages.append(pb.WatchKvEventsResponse(snapshot=pb.KvSnapshot(block_hashes=part, is_last=last)))
    return [message.SerializeToString() for message in messages]


async def snapshots() -> dict[str, Any]:
    """The first cache of a million blocks, the same of a second worker, and the first again after a gap."""
    index, hashes, found = PrefixIndex(4 * BLOCKS), random_hashes(BLOCKS), dict[str, Any]()
    for name, worker_id in (("new blocks", "a"), ("known blocks", "b"), ("again, after a gap", "a")):
        of = worker(worker_id, WorkerRole.PREFILL)
        messages, feed = snapshot_messages(of, hashes), KvFeed(of, index)
        gc.collect()

        async def apply(messages: list[bytes] = messages, feed: KvFeed = feed) -> None:
            for message in messages:
                await feed.apply(pb.WatchKvEventsResponse.FromString(message))
                await asyncio.sleep(0)

        found[name] = await on_loop(apply())
    begin_s, begin_ns = time.perf_counter(), time.thread_time_ns()
    index.drop(worker("a", WorkerRole.PREFILL).start)
    dropped_ms = (time.thread_time_ns() - begin_ns) / 1e6
    parts = cpu_parts_ms(index)
    found["a worker leaves"] = (
        time.perf_counter() - begin_s,
        (dropped_ms + sum(parts)) / 1e3,
        max(dropped_ms, *parts),
    )
    return found


def cpu_parts_ms(index: PrefixIndex) -> list[float]:
    """Times of the parts of a sweep."""
    taken, more = [], True
    while more:
        begin_ns = time.thread_time_ns()
        more = index.sweep()
        taken.append((time.thread_time_ns() - begin_ns) / 1e6)
    return taken


def alternatives() -> dict[str, Any]:
    """The same million blocks in other structures: memory in MB, a lookup in ms, the longest pause of an addition."""
    hashes, found = random_hashes(BLOCKS), dict[str, Any]()
    at = [*hashes[500_000:506_250]]
    before = rss_mb()
    one: dict[int, int] = {}
    worst = 0.0
    for begin in range(0, BLOCKS, 1_024):
        begin_s = time.perf_counter()
        for block_hash in hashes[begin : begin + 1_024]:
            one[block_hash] = 255
        worst = max(worst, time.perf_counter() - begin_s)

    def walk() -> int:
        held, depth = 255, 0
        for block_hash in at:
            held &= one.get(block_hash, 0)
            if not held:
                break
            depth += 1
        return depth

    found["one dictionary, walked block by block"] = (rss_mb() - before, *cpu_ms(walk), worst * 1e3)
    before = rss_mb()
    sets = [set(one) for _ in range(8)]
    memory_mb = rss_mb() - before

    def search() -> list[int]:
        return [depth_in(each, at) for each in sets]

    found["a set for each of 8 workers, searched"] = (memory_mb + found_mb(found), *cpu_ms(search), 0.0)
    return found


def found_mb(found: dict[str, Any]) -> float:
    """Memory of the hashes themselves, which the sets share with the dictionary; about half of it."""
    return float(next(iter(found.values()))[0]) / 2


def depth_in(held: set[int], hashes: list[int]) -> int:
    """Leading hashes in a closed set."""
    low, high = 0, len(hashes) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if hashes[middle - 1] in held else (low, middle)
    return low


def measure(part: str) -> dict[str, Any]:
    """One part, in this process."""
    if part == "snapshots":
        return asyncio.run(snapshots())
    if part == "alternatives":
        return alternatives()
    gc.collect()
    before = rss_mb()
    index = filled(part)
    gc.collect()
    memory_mb = rss_mb() - before
    return {"MB": memory_mb, "blocks": index.block_count, **lookups(index)}


def main() -> None:
    """Run each part in a process of its own and print all figures."""
    parser = argparse.ArgumentParser(description="Figures of the index of cached blocks.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measure(given.part)))
        return
    results = {}
    for part in (*SIZES, "snapshots", "alternatives"):
        command = [sys.executable, "-m", "benchmarks.prefix_index", "--part", part]
        results[part] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if given.json:
        print(json.dumps(results, indent=1))
        return
    for part, figures in results.items():
        print(f"\n{part}")
        for name, value in figures.items():
            values = value if isinstance(value, list) else [value]
            print(f"  {name}: {' / '.join(f'{one:.3f}' for one in values)}")


if __name__ == "__main__":
    main()
