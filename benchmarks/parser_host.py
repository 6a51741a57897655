"""Cost of the parser host and its workers: start, memory, the round trip per chunk, and a worker's replacement.

python benchmarks/parser_host.py
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import psutil

from tandem.output_parsers import ParsedStream, Parsers

MODEL = Path(__file__).parents[1] / "models" / "tandem-demo"
TOOLS = [{"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}]
CHUNKS = 2_000
STREAMS = 64
CALL = '<tool_call>\n{"name": "write", "arguments": {"text": "'


async def feed_us(stream: ParsedStream, chunks: int = CHUNKS) -> list[float]:
    times = []
    for _ in range(chunks):
        begin = time.perf_counter()
        await stream.feed(" word")
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def show(name: str, times: list[float]) -> None:
    ordered = sorted(times)
    print(f"{name:<52} p50 {statistics.median(times):6.0f} us   p99 {ordered[len(ordered) * 99 // 100]:6.0f} us")


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def own_mib(processes: list[psutil.Process]) -> list[int]:
    return [process.memory_full_info().uss >> 20 for process in processes]


async def main() -> None:
    parsers = Parsers(MODEL, tool_parser="qwen25", reasoning_parser="qwen3")
    begin = time.perf_counter()
    await parsers.start()
    host = psutil.Process(parsers.pid)
    workers = [psutil.Process(pid) for pid in parsers.worker_pids]
    print(f"start {time.perf_counter() - begin:.1f} s, of which {sum(host.cpu_times()[:2]):.1f} s CPU time")
    print(f"memory {host.memory_info().rss / 2**20:.0f} MiB, and {own_mib(workers)} MiB of each worker's own")
    show("a chunk of reasoning", await feed_us(await parsers.open(TOOLS, prompt="<think>\n")))
    show("a chunk of content", await feed_us(await parsers.open(TOOLS)))
    stream = await parsers.open(TOOLS)
    await stream.feed(CALL)
    show("a chunk of arguments, the first 500 of a call", await feed_us(stream, 500))
    show("a chunk of arguments, after 30,000 characters", [*await feed_us(stream, 5_500)][-500:])
    begin, used = time.perf_counter(), cpu_s(workers)
    streams = [await parsers.open(TOOLS) for _ in range(STREAMS)]
    await asyncio.gather(*(feed_us(stream, 200) for stream in streams))
    elapsed, cpu = time.perf_counter() - begin, cpu_s(workers) - used
    fed = STREAMS * 200
    print(f"{STREAMS} streams at once: {fed / elapsed:.0f} chunks/s, {cpu / fed * 1e6:.0f} us of CPU for each")
    print(f"memory at the end: {own_mib(workers)} MiB of each worker's own")
    begin = time.perf_counter()
    for worker in workers:
        worker.kill()
    await asyncio.gather(*(stream.feed(" word") for stream in streams))
    print(f"{STREAMS} streams of 200 chunks go on {time.perf_counter() - begin:.2f} s after both workers were killed")
    await parsers.stop()


asyncio.run(main())
