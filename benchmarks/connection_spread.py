"""How a few long-lived connections spread over the processes of one port: `python -m benchmarks.connection_spread`.

Each trial opens connections one after another and keeps them, as edges and gRPC clients do, and then counts the
connections of each process. "reuseport": each process listens itself (SO_REUSEPORT), and the kernel selects one by a
hash of the addresses. "queue": the processes accept from one inherited socket, and the first to wake gets the
connection. "parent": what `--processes` does. Only "queue" depends on the machine's load.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.service.prefork.distribution import fittest
from tandem.service.prefork.process import State

KINDS = ("reuseport", "queue", "parent")
GAP_S = 0.002
"""Between two connections: longer than a process takes to accept one."""


def accept_for_ever(number: int, listening: socket.socket) -> None:
    """A process that serves: says its number to each connection, and keeps it."""
    listening.setblocking(False)
    kept = []
    while True:
        select.select([listening], [], [])
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            continue
        connection.sendall(bytes([number]))
        kept.append(connection)


def listener(*, reuse: bool, port: int = 0) -> socket.socket:
    listening = socket.socket()
    if reuse:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(1_024)
    return listening


@contextmanager
def processes(kind: str, count: int) -> Iterator[int]:
    """Processes of one port; gives the port."""
    first = listener(reuse=kind == "reuseport")
    port = first.getsockname()[1]
    started = []
    for number in range(count):
        own = first if kind == "queue" or number == 0 else listener(reuse=True, port=port)
        os.set_inheritable(own.fileno(), True)
        command = [sys.executable, "-m", "benchmarks.connection_spread", "--serve", str(number), str(own.fileno())]
        started.append(subprocess.Popen(command, pass_fds=[own.fileno()]))
        if own is not first:
            own.close()
    first.close()
    try:
        yield port
    finally:
        for process in started:
            process.kill()
            process.wait()


async def trial(port: int, connections: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    writers = []
    for _ in range(connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        counts[(await reader.readexactly(1))[0]] += 1
        writers.append(writer)
        await asyncio.sleep(GAP_S)
    for writer in writers:
        writer.transport.abort()
    return counts


class Child:
    """One that takes every connection at once."""

    state, call_count, given_number, can_take, is_late = State.SERVING, 0, 0, True, False

    def __init__(self) -> None:
        self.connection_count = 0

    def give(self, connection: object, number: int) -> None:
        self.connection_count += 1
        self.given_number = number


def given(count: int, connections: int) -> Counter[int]:
    children = [Child() for _ in range(count)]
    for number in range(connections):
        found = fittest(children)
        assert found is not None
        found.give(None, number + 1)  # type: ignore[arg-type]
    return Counter({number: child.connection_count for number, child in enumerate(children)})


async def trials(kind: str, count: int, connections: int, repeats: int) -> list[Counter[int]]:
    if kind == "parent":
        return [given(count, connections)] * repeats
    with processes(kind, count) as port:
        for _ in range(100):
            # The first connections come before all of them have started.
            await asyncio.sleep(0.01)
            await trial(port, 1)
        return [await trial(port, connections) for _ in range(repeats)]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--connections", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--trials", type=int, default=200)
    asked = parser.parse_args()
    print(
        f"{asked.processes} processes; of {asked.trials} trials: with a process that got nothing; share of the busiest"
    )
    for connections in asked.connections:
        for kind in KINDS:
            found = await trials(kind, asked.processes, connections, asked.trials)
            idle = sum(len(counts - Counter()) < asked.processes for counts in found)
            busiest = statistics.mean(max(counts.values()) / connections for counts in found)
            print(f"{connections:3} connections  {kind:9}  {idle / len(found):4.0%}  {busiest:4.0%}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        accept_for_ever(int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
    asyncio.run(main())
