"""Cost of a message, a short call and an open stream in a gRPC server: `python -m benchmarks.servers`.

Serves the same small stream from its own process, in turn on grpc.aio and on h2, each with asyncio and uvloop, to a
client process with four grpc.aio connections. Prints the CPU time of the server process per message (64 streams, a
message every 10 ms) and per call of three messages, and its memory per open stream.

"pulled" is an async generator that waits for its next message on a queue, as handlers of grpc.aio must; "pushed" is a
handler that is called with each message and sends it, which only the server on h2 offers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.rpc.channels import open_channel
from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.server import RpcServer
from tandem.rpc.service_host import ServiceHost

NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
KINDS = (
    "grpc.aio asyncio pulled",
    "grpc.aio uvloop pulled",
    "h2 asyncio pulled",
    "h2 uvloop pulled",
    "h2 uvloop pushed",
)
INTERVAL_S = 0.01
CONNECTIONS = 4
SHORT_MESSAGES = 3
STATM = Path("/proc/self/statm")


def message(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(chunk=pb.GenerateChunk(index=index, text=" word", token_ids=[1234]))


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


class Ticker:
    """Gives all sinks a message each 10 ms."""

    def __init__(self) -> None:
        self.sinks: dict[Any, None] = {}
        self._index = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            next_s += INTERVAL_S
            await asyncio.sleep(max(0.0, next_s - loop.time()))
            self._index += 1
            for sink in self.sinks:
                sink(message(self._index))


class Pulled(pb_grpc.InferenceServiceServicer):
    """Streams as grpc.aio has them written."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        if request.prompt == "short":
            for index in range(SHORT_MESSAGES):
                yield message(index)
            return
        queue: asyncio.Queue[pb.GenerateResponse] = asyncio.Queue()
        put = queue.put_nowait
        yield message(0)
        if request.prompt == "paced":
            self._ticker.sinks[put] = None
        try:
            while True:
                yield await queue.get()
        finally:
            self._ticker.sinks.pop(put, None)


class Pushed(pb_grpc.InferenceServiceServicer):
    """Streams that are called with each message."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        if request.prompt == "short":
            for index in range(SHORT_MESSAGES):
                context.send(message(index))
            return
        context.send(message(0))
        if request.prompt == "paced":
            self._ticker.sinks[context.send] = None
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._ticker.sinks.pop(context.send, None)


async def serve(kind: str) -> None:
    ticker = Ticker()
    servicer = Pushed(ticker) if kind.endswith("pushed") else Pulled(ticker)
    add = partial(pb_grpc.add_InferenceServiceServicer_to_server, servicer)
    server: ServiceHost
    if kind.startswith("grpc.aio"):
        server = RpcServer([(NAME, add)])
    else:
        server = Http2RpcServer([(NAME, add)], streams_max=100_000)
    await server.start("127.0.0.1", 0)
    ticking = asyncio.create_task(ticker.run())
    print(server.port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"cpu_s": time.process_time(), "resident": resident_bytes()}), flush=True)
    ticking.cancel()
    await server.stop(0)


async def load(port: int) -> None:
    """Does what each line on standard input says, and answers when it is done."""
    channels = [open_channel(f"127.0.0.1:{port}") for _ in range(CONNECTIONS)]
    stubs: list[Any] = [pb_grpc.InferenceServiceStub(channel) for channel in channels]
    counts = [0]
    calls: list[tuple[Any, asyncio.Task[None]]] = []

    async def read(call: Any, first: asyncio.Event) -> None:
        try:
            async for _ in call:
                counts[0] += 1
                first.set()
        except asyncio.CancelledError:
            pass

    async def open_streams(prompt: str, count: int) -> None:
        firsts = []
        for number in range(count):
            call = stubs[number % CONNECTIONS].Generate(pb.GenerateRequest(prompt=prompt))
            firsts.append(asyncio.Event())
            calls.append((call, asyncio.create_task(read(call, firsts[-1]))))
        await asyncio.gather(*(first.wait() for first in firsts))

    async def short(count: int) -> None:
        async def one_after_the_other(stub: Any) -> None:
            for _ in range(count // CONNECTIONS):
                async for _ in stub.Generate(pb.GenerateRequest(prompt="short"), timeout=30):
                    pass

        await asyncio.gather(*map(one_after_the_other, stubs))

    while line := await asyncio.to_thread(sys.stdin.readline):
        word, *rest = line.split()
        if word == "open":
            await open_streams(rest[0], int(rest[1]))
        elif word == "short":
            await short(int(rest[0]))
        elif word == "close":
            for call, _ in calls:
                call.cancel()
            await asyncio.gather(*(task for _, task in calls), return_exceptions=True)
            calls.clear()
        print(counts[0], flush=True)
    for channel in channels:
        await channel.close()


class Child:
    """One of the two processes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, *arguments: str) -> Child:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "benchmarks.servers", *arguments]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    async def line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    async def ask(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        return await self.line()

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    server = await Child.start("serve", kind)
    client = await Child.start("load", await server.line())

    async def now() -> dict[str, float]:
        found: dict[str, float] = json.loads(await server.ask("now"))
        return found

    await client.ask("short 200")
    begin = await now()
    await client.ask(f"short {arguments.calls}")
    short_us = 1e6 * ((await now())["cpu_s"] - begin["cpu_s"]) / arguments.calls

    await client.ask(f"open paced {arguments.streams}")
    await asyncio.sleep(1)
    begin, count = await now(), int(await client.ask("count"))
    await asyncio.sleep(arguments.seconds)
    end, messages = await now(), int(await client.ask("count")) - count
    message_us = 1e6 * (end["cpu_s"] - begin["cpu_s"]) / messages
    await client.ask("close")

    await client.ask(f"open silent {arguments.open_streams // 4}")
    begin = await now()
    await client.ask(f"open silent {arguments.open_streams}")
    stream_kb = ((await now())["resident"] - begin["resident"]) / 1024 / arguments.open_streams
    await client.end()
    await server.end()
    return {
        "message_us": message_us,
        "messages_per_s": messages / arguments.seconds,
        "short_us": short_us,
        "stream_kb": stream_kb,
    }


async def main(arguments: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    for _ in range(arguments.rounds):
        for kind in arguments.kinds:
            found[kind].append(await measure(kind, arguments))
    print(
        f"| server | us a message ({arguments.streams} streams) | messages/s "
        f"| us a call of {SHORT_MESSAGES} messages | KB an open stream |"
    )
    print("|---|---|---|---|---|")
    for kind, rounds in found.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        print(
            f"| {kind} | {median['message_us']:.1f} | {median['messages_per_s']:.0f} | {median['short_us']:.0f} "
            f"| {median['stream_kb']:.1f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--open-streams", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    if sys.argv[1:2] == ["serve"]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if "uvloop" in sys.argv[2] else None) as runner:
            runner.run(serve(sys.argv[2]))
    elif sys.argv[1:2] == ["load"]:
        asyncio.run(load(int(sys.argv[2])))
    else:
        asyncio.run(main(parser.parse_args()))
