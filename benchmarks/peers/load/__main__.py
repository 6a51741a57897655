"""The clients as a process of their own; the plan is the first line of standard input.

Owns the order: connect, try until a whole answer comes, start all streams when asked to, answer for windows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.peers.lines import read_lines, run, say, serve
from benchmarks.peers.load.grpc_door import Connections, GenerateStream
from benchmarks.peers.load.http_door import ChatStream
from benchmarks.peers.load.leg_door import Contract1Stream, Contract2Stream, StepReader
from benchmarks.peers.load.streams import Load, Plan, Stream

TRY_FOR_S = 60.0
TRY_AGAIN_S = 0.3
TRIED_TOKENS = 2


Make = Callable[[Load, int], Stream]
"""Makes the stream of a number."""


async def connect(load: Load) -> Make:
    """Open what the streams share. Returns what makes them."""
    plan = load.plan
    if plan.door == "http":
        return lambda of, number: ChatStream(of, plan.addresses[number % len(plan.addresses)])
    count = max(len(plan.addresses), min(plan.connections, plan.streams))
    connections = Connections(plan.addresses, len(plan.addresses) if plan.door == "contract2" else count)
    await connections.open()
    if plan.door == "grpc":
        return lambda of, number: GenerateStream(of, connections, number)
    if plan.door == "contract1":
        return lambda of, number: Contract1Stream(of, connections, number)
    readers = []
    for number in range(len(plan.addresses)):
        client = connections.get(number)
        assert client is not None
        readers.append(StepReader(load, client, f"decode-{number}"))
    return lambda of, number: Contract2Stream(of, readers, number)


async def try_once(stream: Stream) -> str:
    """Ask for one whole answer. Returns what went wrong."""
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stream.on_done = lambda problem: None if done.done() else done.set_result(problem)
    stream.begin()
    try:
        return await asyncio.wait_for(done, TRY_FOR_S)
    except TimeoutError:
        return f"no whole answer within {TRY_FOR_S:g} s"


async def wait_until_served(plan: Plan, make: Make) -> str:
    """Return "" when a whole answer has come, else the last problem."""
    load = Load(replace(plan, max_tokens=min(plan.max_tokens, TRIED_TOKENS), seed=plan.seed + 1))
    begin_s = time.monotonic()
    while problem := await try_once(make(load, 0)):
        if time.monotonic() - begin_s > TRY_FOR_S:
            return problem
        await asyncio.sleep(TRY_AGAIN_S)
    return ""


async def main() -> None:
    """Serve the parent until it goes."""
    reader = await read_lines()
    load = Load(Plan(**json.loads(await reader.readline())))
    make = await connect(load)
    say({"problem": await wait_until_served(load.plan, make)})

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        if question["do"] == "start":
            await load.start(partial(make, load))
        elif question["do"] == "window":
            return load.recorder.window(question["begin_s"], question["end_s"])
        return {
            "process_s": time.process_time(),
            "open_streams": load.open_streams,
            "begun": load.begun,
            "failed": load.recorder.failed,
        }

    await serve(reader, answer)
    load.is_running = False


if __name__ == "__main__":
    run(main)
