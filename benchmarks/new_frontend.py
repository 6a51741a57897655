"""How long a new frontend takes to know its workers' prefix caches: `python -m benchmarks.new_frontend`

Eight workers in a process of their own serve WatchKvEvents over gRPC from the mirrors that a worker keeps of its
engine's cache; a frontend's KvWatch follows them into its index. Measures wall time from `follow` until every worker is
credited, and the frontend's CPU time. Frontends know nothing of each other: each one follows the workers themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from tandem_frontend.routing.prefix_index import PrefixIndex

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.client.kv_watch import KvWatch
from tandem.domain.worker import Worker, WorkerRole
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem.worker.kv_messages import Describe
from tests.unit.support.frontend_workers import worker

WORKERS = 8
PAGE_TOKENS = 16
PROBE_S = 0.001
SERVICE = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name


class CacheServicer(pb_grpc.WorkerServiceServicer):
    """WatchKvEvents of one worker, from its mirror, as `WorkerServicer` serves it."""

    def __init__(self, of: Worker, hashes: list[int]) -> None:
        self._epoch = of.epoch
        self.mirror = KvCacheMirror(PAGE_TOKENS)
        self.mirror.stored(hashes, None, ())

    async def WatchKvEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        describe = Describe(epoch=lambda: self._epoch, block_size_tokens=PAGE_TOKENS, with_token_ids=False)
        async with aclosing(self.mirror.follow()) as updates:  # type: ignore[type-var]
            async for update in updates:
                for message in describe.update(update):
                    yield message


def worker_number(number: int, port: int = 1) -> Worker:
    """One of the workers, at its address."""
    return replace(worker(f"prefill-{number}", WorkerRole.PREFILL), address=f"127.0.0.1:{port}")


async def serve(blocks: int, *, shared: bool) -> None:
    """Serve all workers until standard input ends; the first line printed has their ports."""
    async with AsyncExitStack() as stack:
        ports = []
        for number in range(WORKERS):
            rng = random.Random(0 if shared else number)
            hashes = [rng.getrandbits(64) - 2**63 for _ in range(blocks if shared else blocks // WORKERS)]
            servicer = CacheServicer(worker_number(number), hashes)  # type: ignore[abstract]
            server = RpcServer([(SERVICE, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
            await server.start("127.0.0.1", 0)
            stack.push_async_callback(server.stop, 0)
            ports.append(server.port)
        print(json.dumps(ports), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def follow(ports: list[int]) -> dict[str, float]:
    """A frontend that begins now, until it credits every worker."""
    channels, index = Channels(), PrefixIndex(16_000_000)
    watch, workers = KvWatch(channels, index), [worker_number(number, port) for number, port in enumerate(ports)]
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    watch.follow(workers)
    while not all(index.is_trusted(one.start) for one in workers):  # noqa: ASYNC110 -- the index has no event for it
        await asyncio.sleep(PROBE_S)
    took = {"wall s": time.perf_counter() - begin_s, "CPU s": time.process_time() - begin_cpu_s}
    await watch.close()
    await channels.close()
    return {**took, "blocks": float(index.block_count)}


def measure(blocks: int, repeats: int, *, shared: bool) -> list[dict[str, float]]:
    """New frontends, one after another, at the same workers."""
    command = [sys.executable, "-m", "benchmarks.new_frontend", "--serve", "--blocks", str(blocks)]
    with subprocess.Popen(
        [*command, *(["--shared"] if shared else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as workers:
        assert workers.stdout is not None
        ports = json.loads(workers.stdout.readline())
        found = [asyncio.run(follow(ports)) for _ in range(repeats)]
        workers.communicate("")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="of all workers together; with --shared of each")
    parser.add_argument("--repeats", type=int, default=3, help="new frontends")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help="every worker has the same blocks")
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve(asked.blocks, shared=asked.shared))
        return
    for shared in (False, True):
        for one in measure(asked.blocks, asked.repeats, shared=shared):
            print("the same for each worker" if shared else "of its own for each worker", end=": ")
            print(", ".join(f"{name} {value:,.2f}" for name, value in one.items()))


if __name__ == "__main__":
    main()
