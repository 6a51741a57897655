"""Frontends' knowledge of real prefix caches under losses and restarts: `python -m benchmarks.kv_events_soak`

A pair and an aggregated worker with SGLang on this machine's CPU, decode with its prefix cache, behind a frontend that
routes by `prefix`; small caches, so that blocks are evicted all the time. 1 % of the engines' KV messages are lost, and
a worker is killed at random about once a minute. Two proofs, for which the command ends with status 1 if one fails:

- Every 20 s the load stops. 2 s after a worker's last event, what an index beside the frontend's (of the same code,
  following the same streams) holds of the worker is copied, and then compared with what the engine itself says.
- Each finish says how many prompt tokens the policy expected in the cache, and how many the engine found. It found
  fewer only where the removal of the first missing block was reported while the request was under way, or up to 3 s
  later: that event may have been lost first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tandem_frontend.routing.prefix_index import PrefixIndex

from benchmarks import kv_events_soak_worker as worker_program
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import sampling_pb2
from tandem.client import calls
from tandem.client.kv_watch import KvWatch
from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import Start, Worker
from tandem.errors import TandemError
from tandem.local_cluster.child_process import MODULES, ClusterProcess, ProcessState
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.restarts import Restarts
from tandem.rpc.channels import Channels, open_channel
from tandem.rpc.convert import worker_from_proto
from tandem.service.restart_budget import RestartPolicy

MODEL = Path("models") / "tandem-demo"
PAGE = 16
TOKEN_IDS = range(10, 1_000)
SETTLE_S = 2.0
"""After the last event an index must equal the engine's cache."""
LOAD_S = 20.0
"""Of load between two comparisons."""
CHATS, DOCUMENTS = 6, 12
RESTARTS = RestartPolicy(count_max=1_000, first_delay_s=0.5)
LATE_S = 3.0
"""A removal is known at most so long after the request that met it has ended: its event may have been lost."""
ON_THE_WAY_S = 0.5
"""The frontend and the index here get the same event at different times."""


class RecordingIndex(PrefixIndex):
    """The frontend's index, with a memory of what was removed when."""

    def __init__(self) -> None:
        super().__init__(1_000_000)
        self.removed_s: dict[tuple[str, int], list[float]] = {}
        """By worker id and block: each time, because a block may be stored and removed again."""
        self.removals = 0
        self.changed_s: dict[str, float] = {}
        """When each worker's cache was last written."""
        self.suspected_s: dict[str, float] = {}
        """When each worker last lost its credit."""
        self._before: dict[str, set[int]] = {}
        """What a worker held when its credit was lost."""

    def held(self, start: Start) -> set[int]:
        """The blocks of a worker."""
        cache = self._caches.get(start)
        if cache is None or cache.slot is None:
            return set()
        bit = 1 << cache.slot
        return {block for shard in self._table._shards for block, mask in shard.items() if mask & bit}

    def add(self, start: Start, hashes: Sequence[int]) -> None:
        """See `PrefixIndex`."""
        self.changed_s[start[0]] = time.monotonic()
        super().add(start, hashes)

    def remove(self, start: Start, hashes: Sequence[int]) -> None:
        """See `PrefixIndex`."""
        self.changed_s[start[0]] = time.monotonic()
        self._note(start[0], hashes)
        super().remove(start, hashes)

    def suspect(self, start: Start) -> None:
        """See `PrefixIndex`."""
        self.suspected_s[start[0]] = time.monotonic()
        self._keep(start)
        super().suspect(start)

    def drop(self, start: Start) -> None:
        """See `PrefixIndex`."""
        self._keep(start)
        super().drop(start)

    def complete(self, start: Start) -> None:
        """See `PrefixIndex`."""
        super().complete(start)
        # What a lost event removed shows in the next snapshot.
        self._note(start[0], self._before.pop(start[0], set()) - self.held(start))

    def _keep(self, start: Start) -> None:
        held = self.held(start)
        if held:
            self._before[start[0]] = held

    def _note(self, worker_id: str, hashes: Sequence[int] | set[int]) -> None:
        now_s = time.monotonic()
        self.removals += len(hashes)
        for block in hashes:
            self.removed_s.setdefault((worker_id, block), []).append(now_s)


@dataclass
class Request:
    """A finished request that found less than was expected."""

    prompt: tuple[int, ...]
    worker_id: str
    expected: int
    cached: int
    begin_s: float
    end_s: float

    @property
    def missing(self) -> int:
        """The first block that was not there."""
        return block_hashes(self.prompt, PAGE)[self.cached // PAGE]


@dataclass
class Figures:
    """What has happened so far."""

    requests: int = 0
    failed: int = 0
    continued: int = 0
    """Finished after another attempt, and not compared."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_tokens: int = 0
    exact: int = 0
    more: int = 0
    """Found more than expected: it was computed after the choice."""
    fewer: list[Request] = field(default_factory=list)
    kills: list[tuple[str, float]] = field(default_factory=list)
    """Worker id and time of each."""
    comparisons: int = 0
    blocks: int = 0
    unequal: list[str] = field(default_factory=list)
    messages: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(messages, lost ones) by process."""

    def unexplained(self, index: RecordingIndex) -> list[Request]:
        """Requests that were credited with a block whose removal did not meet them."""
        return [one for one in self.fewer if not _met(one, index.removed_s.get((one.worker_id, one.missing), ()))]

    def unknown(self, index: RecordingIndex) -> list[Request]:
        """Those of them whose worker was killed before it could report a removal."""
        killed_s: dict[str, list[float]] = {}
        for worker_id, time_s in self.kills:
            killed_s.setdefault(worker_id, []).append(time_s)
        return [one for one in self.unexplained(index) if _met(one, killed_s.get(one.worker_id, ()))]


def _met(one: Request, times_s: Sequence[float]) -> bool:
    """Whether any of the times is within the request, or so little after it that its event was on the way."""
    return any(one.begin_s - ON_THE_WAY_S <= time_s <= one.end_s + LATE_S for time_s in times_s)


class Soak:
    """One run."""

    def __init__(self, cluster: LocalCluster, directory: Path, seed: int) -> None:
        self.figures = Figures()
        self.index = RecordingIndex()
        self._cluster = cluster
        self._directory = directory
        self._draw = random.Random(seed)
        self._channels = Channels()
        self._watch = KvWatch(self._channels, self.index)
        self._workers: list[Worker] = []
        self._may_run = asyncio.Event()
        self._open = 0

    async def run(self, minutes: float) -> None:
        """Load, losses and restarts for so long; ends with a comparison."""
        end_s = time.monotonic() + 60 * minutes
        restarts = Restarts(self._cluster, lambda line: print(f"  {line}", flush=True), RESTARTS)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work) for work in (restarts.run(), self._follow(), *map(self._chat, range(CHATS)))
            ]
            # Both kinds of worker have answered before the first loss counts.
            while time.monotonic() < end_s:
                self._may_run.set()
                await asyncio.sleep(LOAD_S / 2)
                if self._draw.random() < LOAD_S / 60 and time.monotonic() < end_s - 60:
                    self._kill()
                await asyncio.sleep(LOAD_S / 2)
                self._may_run.clear()
                await self._compare()
            for task in tasks:
                task.cancel()
        await self._watch.close()
        await self._channels.close()

    def _kill(self) -> None:
        if all(process.state is ProcessState.READY for process in self._cluster.workers):
            process = self._draw.choice(self._cluster.workers)
            print(f"  killing {process.name}", flush=True)
            self.figures.kills.append((process.name, time.monotonic()))
            process.kill()

    async def _follow(self) -> None:
        """Keep the index on the workers of the registry's view."""
        while True:
            with suppress(TandemError):
                listed = await calls.list_workers(self._cluster.registry.address)
                self._workers = [worker_from_proto(one.worker) for one in listed]
                self._watch.follow(self._workers)
            await asyncio.sleep(0.2)

    async def _compare(self) -> None:
        while self._open:  # noqa: ASYNC110 -- a few times in a minute
            await asyncio.sleep(0.02)
        ended_s = time.monotonic()
        processes = {process.name: process for process in self._cluster.workers if process.runs}
        for worker in self._workers:
            process = processes.get(worker.worker_id)
            if process is None or not await self._compared(worker, process, ended_s):
                print(f"  {worker.worker_id} is not compared: it is starting", flush=True)
        print(self.line(), flush=True)

    async def _compared(self, worker: Worker, process: ClusterProcess, ended_s: float) -> bool:
        """Compare one worker, SETTLE_S after its last event; returns False where its engine does not answer yet."""
        index = self.index
        while True:
            last_s = max(ended_s, index.changed_s.get(worker.worker_id, 0.0))
            await asyncio.sleep(max(0.0, last_s + SETTLE_S - time.monotonic()))
            copied_s, held, is_trusted = time.monotonic(), index.held(worker.start), index.is_trusted(worker.start)
            own = await self._read(process)
            if own is None:
                return False
            is_equal = is_trusted and held == own
            # An attempt that has failed elsewhere may end later than its request. But a loss that only shows because
            # the engine is asked is a loss that was not repaired in time.
            is_late = index.changed_s.get(worker.worker_id, 0.0) > copied_s
            if is_equal or not is_late or index.suspected_s.get(worker.worker_id, 0.0) > copied_s:
                break
        self.figures.comparisons += 1
        self.figures.blocks += len(own)
        if not is_equal:
            state = "followed" if is_trusted else "not followed"
            self.figures.unequal.append(
                f"{worker.worker_id}, {state}: {len(held - own)} too many, {len(own - held)} missing of {len(own)}"
            )
            print(f"  unequal: {self.figures.unequal[-1]}", flush=True)
        return True

    async def _read(self, process: ClusterProcess) -> set[int] | None:
        """What the engine itself has cached; None: it has not started yet."""
        path = self._directory / f"{process.pid}.sock"
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError:
            return None
        answer = json.loads(await reader.read() or '{"hashes": null}')
        writer.close()
        if answer["hashes"] is None:
            return None
        self.figures.messages[process.pid] = answer["messages"], answer["lost"]
        return set(answer["hashes"])

    async def _chat(self, number: int) -> None:
        """One conversation after the other, on one of a few documents that they share."""
        draw = random.Random(number)
        async with open_channel(self._cluster.frontend.address) as channel:
            stub: Any = InferenceServiceStub(channel)
            while True:
                said = random.Random(draw.randrange(DOCUMENTS)).choices(TOKEN_IDS, k=160)
                for _ in range(draw.randrange(2, 6)):
                    said += draw.choices(TOKEN_IDS, k=draw.randrange(20, 90))
                    await self._may_run.wait()
                    self._open += 1
                    try:
                        said += await self._ask(stub, tuple(said))
                    except grpc.aio.AioRpcError:
                        self.figures.failed += 1
                        await asyncio.sleep(0.5)
                        break
                    finally:
                        self._open -= 1

    async def _ask(self, stub: Any, prompt: tuple[int, ...]) -> list[int]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            stopping=sampling_pb2.Stopping(max_tokens=12, ignore_eos=True),
        )
        begin_s, answer, finish = time.monotonic(), list[int](), pb.GenerateFinish()
        async for event in stub.Generate(request, timeout=60):
            answer += event.chunk.token_ids
            if event.HasField("finish"):
                finish = event.finish
        self._count(Request(prompt, *_of(finish), begin_s, time.monotonic()), finish.route.attempt)
        return answer

    def _count(self, one: Request, attempt: int) -> None:
        figures = self.figures
        figures.requests += 1
        if attempt > 1:
            figures.continued += 1
            return
        figures.prompt_tokens += len(one.prompt)
        figures.cached_tokens += one.cached
        figures.expected_tokens += one.expected
        if one.cached < one.expected:
            figures.fewer.append(one)
        elif one.cached == one.expected:
            figures.exact += 1
        else:
            figures.more += 1

    def line(self) -> str:
        """The figures so far."""
        figures, messages = self.figures, [*self.figures.messages.values()]
        read, lost = sum(one[0] for one in messages), sum(one[1] for one in messages)
        unexplained, unknown = figures.unexplained(self.index), figures.unknown(self.index)
        rate = figures.cached_tokens / max(1, figures.prompt_tokens)
        return (
            f"{figures.requests} requests ({figures.failed} failed, {figures.continued} continued), hit rate "
            f"{rate:.3f}; found as expected {figures.exact}, more {figures.more}, fewer {len(figures.fewer)}, of these "
            f"unexplained {len(unexplained)} ({len(unknown)} on a worker killed then); {len(figures.kills)} kills; "
            f"{lost} of {read} messages lost; {figures.comparisons} comparisons of {figures.blocks} blocks, unequal "
            f"{len(figures.unequal)}; {self.index.removals} blocks removed"
        )


def _of(finish: pb.GenerateFinish) -> tuple[str, int, int]:
    """The worker that computed the prompt, what was expected in its cache, and what was there."""
    route = finish.route
    worker_id = route.prefill_worker_id or route.decode_worker_id
    return worker_id, route.expected_cached_tokens, finish.usage.cached_tokens


def _cluster(logs: Path, capacity_tokens: int) -> LocalCluster:
    flags = {
        "dtype": "float32",
        "kv-capacity-tokens": str(capacity_tokens),
        "engine-extra": json.dumps({"page_size": PAGE}),
    }
    decode = {"engine-extra": json.dumps({"page_size": PAGE, "disaggregation_decode_enable_radix_cache": True})}
    roles = {"decode": decode, "frontend": {"routing-policy": "prefix", "local-prefill-max-tokens": "64"}}
    spec = ClusterSpec(model=MODEL, aggregated=1, log_directory=logs, worker_flags=flags, role_flags=roles)
    cluster = LocalCluster(spec)
    for process in cluster.workers:
        _replace_program(process)
    return cluster


def _replace_program(process: ClusterProcess) -> None:
    """Start the worker around its program that loses messages."""
    command = process._command

    def of_soak() -> list[str]:
        python, module_flag, module, *flags = command()
        assert module == MODULES[process.role], "a worker's command names its module"
        return [python, module_flag, worker_program.__name__, module, *flags]

    process._command = of_soak  # type: ignore[method-assign]


async def _main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        environment = {worker_program.DIRECTORY: name, worker_program.LOSS: str(options.loss)}
        cluster = _cluster(options.logs or directory, options.capacity_tokens)
        for process in cluster.workers:
            process.secrets = environment
        async with cluster:
            soak = Soak(cluster, directory, options.seed)
            await soak.run(options.minutes)
    print(soak.line())
    for difference in soak.figures.unequal:
        print(f"unequal: {difference}")
    unknown = soak.figures.unknown(soak.index)
    unexplained = [one for one in soak.figures.unexplained(soak.index) if one not in unknown]
    for one in unexplained:
        removed_s = soak.index.removed_s.get((one.worker_id, one.missing), [])
        when = ", ".join(f"{time_s - one.end_s:+.2f} s" for time_s in removed_s) or "never"
        print(f"unexplained: {one.cached} instead of {one.expected} tokens on {one.worker_id}; removed {when}")
    return 1 if soak.figures.unequal or unexplained else 0


def main() -> None:
    """Run, and exit with status 1 if a proof has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--loss", type=float, default=0.01, help="share of the engines' KV messages that are lost")
    parser.add_argument("--capacity-tokens", type=int, default=3_072, help="KV memory of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=None, help="directory of the processes' logs; default: not kept")
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
