"""Real engines whose requests can be held in a phase, and what is asked of them: streams, phases, pages, processes.

Owns the cluster, the streams and the proof of a stream's phase. What breaks, and what must follow, is the tests'.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fault_cluster import FaultCluster, Plan
from tests.faults.support.history import Asked, History, now_s
from tests.faults.support.process_faults import free_port, frozen
from tests.faults.support.sglang_holds import CHUNK_S, MARKS, STEP_S, Holds, plug_in
from tests.faults.support.steady_load import _note

ON_SGLANG = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),
]
FLAGS = {
    "engine": "sglang",
    "dtype": "float32",
    "drain-timeout-s": "60",
    # So that a prompt has several steps, and its KV goes over in several pieces.
    "engine-extra": json.dumps({"chunked_prefill_size": 64}),
}
AT_ONCE = {"routing-policy": "random", "no-worker-wait-s": "0"}
"""Requests must come to each worker, and one without a worker is to fail: no killed worker is restarted."""
TOKENS = 96
PROMPT_TOKENS = {"bootstrapping": 80, "prefilling": 900, "transferring": 200, "decoding": 40}
"""A held prompt of 900 tokens is computed in 15 steps, and 96 tokens are decoded in 96: in 4 s and in 19 s."""
IN_TURN = ("decoding", "transferring", "bootstrapping", "prefilling")
"""In this order none waits behind another: only the last one fills the engine's steps."""
TOKENS_MIN = 3
"""Of a stream that counts as decoding."""
CALM_S = 60.0
"""Until whatever a test before has left is over."""
TRIES_MAX = 14
"""Until a request has come to the victim: which pair is drawn is the frontend's."""


@dataclass(slots=True)
class Stream:
    """A request and its place."""

    asked: Asked
    phase: str = ""
    request_id: str = ""
    rooms: list[int] = field(default_factory=list)
    """Of its first attempt."""
    task: asyncio.Task[None] | None = None


def prompt_of(phase: str, number: int = 0) -> tuple[int, ...]:
    """A prompt that is held in that phase wherever it is held."""
    draw = random.Random(f"{phase}-{number}")
    return (MARKS[phase], *(draw.randrange(20, 1536) for _ in range(PROMPT_TOKENS[phase] - 1)))


async def follow(stream: Stream, timeout_s: float | None) -> None:
    """Ask, and write down what comes."""
    asked = stream.asked
    request = pb.GenerateRequest(
        token_ids={"ids": asked.prompt},  # type: ignore[arg-type]
        sampling={"temperature": 0.0},  # type: ignore[arg-type]
        stopping={"max_tokens": asked.max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
    )
    try:
        async with contextlib.aclosing(calls.generate(asked.frontend, request, timeout_s)) as events:
            async for event in events:
                if event.HasField("accepted"):
                    stream.request_id = event.accepted.request_id
                    stream.rooms.append(event.accepted.route.bootstrap_room)
                _note(asked, event)
    except TandemError as problem:
        asked.failure = problem
    finally:
        asked.end_s = now_s()


class SglangFleet(FaultCluster):
    """See the module; use `sglang_fleet`."""

    def __init__(self, plan: Plan, logs: Path, stack: AsyncExitStack, holds: Holds) -> None:
        super().__init__(plan, logs, stack)
        self.holds = holds
        self.numbers = iter(range(1_000))

    def worker_flags(self, name: str, registries: str) -> dict[str, str]:
        flags = super().worker_flags(name, registries)
        # A new start is met at the place where decode engines remember the old one.
        return {**flags, "bootstrap-port": str(free_port())} if name.startswith("prefill") else flags

    def begin(self, prompt: tuple[int, ...], phase: str = "", timeout_s: float | None = 120) -> Stream:
        """Ask for one stream."""
        asked = Asked(next(self.numbers), self.frontends[0].address, prompt, TOKENS, now_s())
        stream = Stream(asked, phase)
        stream.task = asyncio.create_task(follow(stream, timeout_s), name=f"stream-{asked.number}")
        return stream

    async def answers(self, prompts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
        """What comes to prompts when nothing breaks."""
        streams = [self.begin(prompt) for prompt in prompts]
        await ended(streams)
        assert not len(failed := History(s.asked for s in streams).failed()), failed.lines()
        assert all(len(stream.asked.tokens) == TOKENS for stream in streams)
        return {stream.asked.prompt: stream.asked.tokens for stream in streams}

    @asynccontextmanager
    async def asking(self, prompts: Iterable[tuple[int, ...]]) -> AsyncIterator[list[Stream]]:
        """A request for each prompt in turn, one after another, as long as the block."""
        streams: list[Stream] = []

        async def ask() -> None:
            for prompt in itertools.cycle(prompts):
                streams.append(self.begin(prompt))
                await ended(streams[-1:])

        asks = asyncio.create_task(ask(), name="asks")
        yield streams
        asks.cancel()
        await ended(streams)

    async def forget(self) -> None:
        """Empty every prefix cache: what is cached has no phases to be held in. Decode has none."""
        for worker in (worker for worker in self.of_role("prefill") if worker.runs):
            async with open_channel(worker.address) as channel:
                stub: Any = WorkerServiceStub(channel)
                epoch = (await stub.GetCapabilities(worker_pb.GetCapabilitiesRequest())).worker.epoch
                assert (await stub.FlushCache(worker_pb.FlushCacheRequest(worker_epoch=epoch))).flushed, worker.name

    async def in_every_phase(self, victim: str) -> list[Stream]:
        """Streams of which that worker has one in each phase, held there; those that came to others are among them."""
        self.holds.end()
        await self.assert_no_legs(CALM_S)
        await self.forget()
        self.holds.begin(*(worker.name for worker in self.workers))
        streams: list[Stream] = []
        for phase in IN_TURN:
            for number in range(TRIES_MAX):
                stream = self.begin(prompt_of(phase, number), phase)
                streams.append(stream)
                await _until_assigned(stream)
                if victim in stream.asked.workers:
                    await self._until_in_phase(stream)
                    break
                self.holds.free(stream.rooms[-1])
            else:
                raise AssertionError(f"void: no request of {TRIES_MAX} came to {victim}")
        return streams

    async def _until_in_phase(self, stream: Stream) -> None:
        await assert_eventually(lambda: self.is_in_phase(stream, now_s()), within_s=20, what=f"hold: {stream.phase}")

    def is_in_phase(self, stream: Stream, time_s: float) -> bool:
        """Whether a stream stood in its phase at that moment, by proof of the hold and by what its client has."""
        phase, asked = stream.phase, stream.asked
        if (asked.end_s or float("inf")) < time_s:
            return False
        count = sum(token_s <= time_s for token_s in asked.token_times_s)
        held = [
            h.time_s for h in self.holds.held() if h.room in stream.rooms and h.phase == phase and h.time_s < time_s
        ]
        if not held or (count < TOKENS_MIN) is (phase == "decoding"):
            return False
        # Steps are held one by one: the last was just now, and there was more than one.
        step_s = {"prefilling": CHUNK_S, "decoding": STEP_S}.get(phase)
        return step_s is None or (len(held) > 1 and time_s - held[-1] < step_s + 1.0)

    def held_by(self, streams: list[Stream], victim: str, time_s: float) -> dict[str, list[Stream]]:
        """The victim's streams by phase at that moment.

        Raises:
            AssertionError: it had none in one of them, so that nothing was proved.
        """
        had = [s for s in streams if victim in s.asked.workers and self.is_in_phase(s, time_s)]
        found = {phase: [s for s in had if s.phase == phase] for phase in MARKS}
        assert all(found.values()), f"void: {victim} had at the fault only {found}"
        return found

    def summary(self, stream: Stream) -> str:
        """What came of a stream, with the frontend's log lines about its request."""
        lines = self.frontends[0].log.read_text(errors="replace").splitlines()
        about = [line for line in lines if stream.request_id and stream.request_id in line]
        return "\n".join([stream.asked.summary(), *about])

    async def loads(self) -> dict[str, worker_pb.WatchLoadResponse]:
        """Of all workers that run."""
        return {w.name: await calls.worker_load(w.address) for w in self.workers if w.runs}

    async def assert_no_legs(self, within_s: float) -> None:
        """No worker that runs has a leg."""
        await assert_eventually(
            lambda: self._held("open_legs", "running_requests", "waiting_requests", "transferring_requests"),
            lambda found: not any(found.values()),
            within_s=within_s,
            what="workers without a leg",
        )

    async def assert_no_pages(self, within_s: float) -> None:
        """No worker that runs has a page of a request, and what is left is cached or free."""
        await assert_eventually(
            lambda: self._held("kv_used_tokens", "kv_transferring_tokens"),
            lambda found: not any(found.values()),
            within_s=within_s,
            what="pages of no request",
        )
        for name, load in (await self.loads()).items():
            assert load.kv_cached_tokens + load.kv_free_tokens == load.kv_capacity_tokens, name

    async def _held(self, *fields: str) -> dict[str, int]:
        return {name: sum(getattr(load, f) for f in fields) for name, load in (await self.loads()).items()}


async def ended(streams: Iterable[Stream]) -> None:
    """Return when all of them have ended."""
    tasks = {stream.task for stream in streams if stream.task is not None}
    if tasks:
        done, _ = await asyncio.wait(tasks)
        for task in done:
            task.result()


@asynccontextmanager
async def all_frozen(worker: ClusterProcess) -> AsyncIterator[float]:
    """Stop a worker's process and its engine's, as a machine that stands still does; yields since when."""
    processes = [worker.pid, *(child.pid for child in psutil.Process(worker.pid).children(recursive=True))]
    async with AsyncExitStack() as stack:
        times = [await stack.enter_async_context(frozen(pid)) for pid in processes]
        yield times[0]


def scheduler_of(worker: ClusterProcess) -> int:
    """The process of that worker's engine that runs the model: it keeps its counters in shared memory."""
    for child in psutil.Process(worker.pid).children(recursive=True):
        if "/dev/shm/sglang_loads_" in Path(f"/proc/{child.pid}/maps").read_text():
            return child.pid
    raise AssertionError(f"{worker.name} has no scheduler")


@asynccontextmanager
async def sglang_fleet(logs: Path, *, prefill: int, decode: int) -> AsyncIterator[SglangFleet]:
    """So many engines of each role with one frontend, as long as the block."""
    plan = Plan(
        registries=1,
        frontends=1,
        prefill=prefill,
        decode=decode,
        lease_s=5.0,
        worker_flags=FLAGS,
        frontend_flags=AT_ONCE,
    )
    with pytest.MonkeyPatch.context() as environment:
        holds = plug_in(logs, environment)
        # As between hosts: a write needs its peer. Through shared memory a stopped process would be written to.
        environment.setenv("UCX_TLS", "tcp")
        async with AsyncExitStack() as stack:
            fleet = SglangFleet(plan, logs, stack, holds)
            await fleet.start()
            yield fleet


async def _until_assigned(stream: Stream) -> None:
    await assert_eventually(lambda: stream.asked.workers, within_s=20, what="workers")
