"""The cluster of the scorecard, the streams on it, and what they met.

Two pairs of simulated workers, two frontends, an edge and a registry, as processes of their own. A stream records each
token with its time; the tokens of the simulated engine are known, so that a wrong one is found.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.client import calls
from tandem.domain.checkpoint import read_checkpoint
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually

MODEL = Path("models") / "tandem-demo"
ENGINE = {"decode_step_s": 0.02, "prefill_tokens_per_s": 4_000.0, "chunked_prefill_tokens": 256}
PAIRS = FRONTENDS = 2
RESTORED_WITHIN_S = 60.0
DEADLINE_S = 30.0


@dataclass
class Stream:
    """One request. Times are of `time.perf_counter`."""

    begin_s: float = field(default_factory=time.perf_counter)
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    problem: TandemError | None = None
    workers: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether it ended with exactly the tokens of an undisturbed run."""
        return self.problem is None and self.token_ids == self.expected

    def longest_pause_s(self, since_s: float) -> float:
        """The longest time without a token that ended after a moment."""
        points = [self.begin_s, *self.times_s]
        pauses = [b - max(a, since_s) for a, b in pairwise(points) if b > since_s]
        return max(pauses, default=0.0)


class Fleet:
    """See the module; use `fleet`."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self.cluster = cluster
        self._draw = random.Random(seed)
        self._vocabulary = read_vocabulary(read_checkpoint(MODEL))

    def process(self, name: str) -> ClusterProcess:
        """The process of that name."""
        return self.cluster.process(name)

    async def run(self, stream: Stream, *, prompt: int = 64, tokens: int = 100, frontend: int = 0) -> None:
        """Make one request and record it to its end; a failure is recorded, too."""
        ids = [self._draw.randrange(6, 1536) for _ in range(prompt)]
        stream.expected = expected_tokens(self._vocabulary, ids, tokens)
        request = pb.GenerateRequest(
            token_ids={"ids": ids},  # type: ignore[arg-type]
            sampling={"temperature": 0.0},  # type: ignore[arg-type]
            stopping={"max_tokens": tokens, "ignore_eos": True},  # type: ignore[arg-type]
        )
        address = self.cluster.frontends[frontend % FRONTENDS].address
        try:
            async for event in calls.generate(address, request, DEADLINE_S):
                if event.HasField("accepted"):
                    route = event.accepted.route
                    stream.workers = (route.prefill_worker_id, route.decode_worker_id)
                elif event.HasField("chunk"):
                    stream.times_s.append(time.perf_counter())
                    stream.token_ids += event.chunk.token_ids
        except TandemError as problem:
            stream.problem = problem

    @asynccontextmanager
    async def streams(self, count: int = 8, *, first: int = 0, **shape: int) -> AsyncIterator[list[Stream]]:
        """So many requests at once, spread over the frontends from `first` on; the end waits for all."""
        streams = [Stream() for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for number, stream in enumerate(streams):
                group.create_task(self.run(stream, frontend=first + number, **shape))
            yield streams

    async def kill(self, name: str) -> float:
        """SIGKILL. Returns when, once the process is gone."""
        process, killed_s = self.process(name), time.perf_counter()
        process.signal(signal.SIGKILL)
        await process.wait_ended()
        return killed_s

    async def held(self) -> int:
        """Requests that the engines hold."""
        loads = [await calls.worker_load(worker.address) for worker in self.cluster.workers if worker.runs]
        return sum(load.running_requests + load.waiting_requests + load.transferring_requests for load in loads)

    async def idle_within_s(self) -> float:
        """Time until no engine holds a request."""
        begin_s = time.perf_counter()
        await until(self.held, lambda count: count == 0)
        return time.perf_counter() - begin_s

    async def restore(self) -> None:
        """Start what has ended, and wait until every worker serves and a request succeeds at each frontend."""
        for process in self.cluster.processes:
            process.signal(signal.SIGCONT)
            if not process.runs or process.exit_status is not None:
                await self.cluster.restart(process.name)
        await until(self._serving, lambda count: count == 2 * PAIRS)

        async def all_right() -> bool:
            async with self.streams(2 * FRONTENDS, tokens=4) as streams:
                pass
            return all(stream.is_right for stream in streams)

        await until(all_right, bool)
        await until(self.held, lambda count: count == 0)

    async def _serving(self) -> int:
        listed = await calls.list_workers(self.cluster.registry.address)
        return sum(entry.worker.state == worker_pb2.WORKER_STATE_SERVING for entry in listed)


async def until(look: Callable[[], Awaitable[Any]], good: Callable[[Any], bool]) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it did not hold within RESTORED_WITHIN_S.
    """
    await assert_eventually(look, good, within_s=RESTORED_WITHIN_S, every_s=0.02)


@asynccontextmanager
async def fleet(logs: Path, seed: int) -> AsyncIterator[Fleet]:
    """A fleet that serves."""
    flags = {"engine-extra": json.dumps(ENGINE)}
    spec = ClusterSpec(
        model=MODEL, engine="simulated", log_directory=logs, worker_flags=flags, prefill=PAIRS, decode=PAIRS,
        frontends=FRONTENDS, edge=True, role_flags={"registry": {"lease-ttl-s": "2"}},
    )  # fmt: skip
    async with LocalCluster(spec) as cluster:
        yield Fleet(cluster, seed)
