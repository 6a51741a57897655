"""How soon a failed leg is detected and its stream continues: `python -m benchmarks.leg_faults`.

Simulated engines, two pairs of workers, real processes and signals. A round injects one fault under a few requests: a
decode worker killed or stopped in mid-stream, a prefill worker killed or stopped while requests are queued in it, and
clients that disconnect in each phase. Times are the clients' and the engines' own, all from one machine's clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fault_cluster import DEMO_MODEL, Plan
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import LegCluster, assert_idle, fired, inject, leg_cluster
from tests.faults.support.process_faults import frozen, kill
from tests.faults.support.views import Views
from tests.faults.test_leg_cancels import HOLDS, by_the_client, rules

STREAMS = 6
STREAM_TOKENS = 100
ENGINE = {"decode_step_s": 0.02}
"""Slow, so that the frontend has time: a token each 3 ms for all streams together."""
GOALS_MS = {
    "continuation_gap_after_kill": {"most": 300.0},
    "next_attempt_after_kill": {"most": 500.0},
    "next_attempt_after_stop": {"most": 2_000.0},
    "next_token_after_stop": {"most": 2_000.0},
    "both_engines_idle_after_cancel": {"median": 200.0, "most": 1_000.0},
}
PASSED = {"point": "bootstrap", "kind": "delay", "delay_s": 0.0}
"""Changes nothing, and reports when a leg has come to an engine."""


@dataclass(slots=True)
class Stream:
    """One request of a round. Times are seconds since the Unix epoch, as the engines report theirs."""

    request_id: str = ""
    workers: tuple[str, ...] = ()
    times_s: list[float] = field(default_factory=list)
    attempt: int = 0
    prefill_s: float = 0.0
    """Of the last attempt, by its timings."""

    def longest_pause_s(self, from_s: float) -> float:
        """Between two tokens, of those that ended after a moment."""
        return max(later - earlier for earlier, later in pairwise(self.times_s) if later > from_s)


class Bench:
    """One cluster and the rounds on it."""

    def __init__(self, cluster: LegCluster, views: Views, seed: int) -> None:
        self.cluster = cluster
        self.views = views
        self.draw = random.Random(seed)
        self.found_ms: dict[str, list[float]] = {}

    def note(self, name: str, seconds: float) -> None:
        self.found_ms.setdefault(name, []).append(1e3 * seconds)

    @asynccontextmanager
    async def streams(self, max_tokens: int) -> AsyncIterator[list[Stream]]:
        """Some requests at once; leaving the block waits for them, and none may fail."""
        streams = [Stream() for _ in range(STREAMS)]
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(self._read(stream, max_tokens))
            yield streams

    async def _read(self, stream: Stream, max_tokens: int) -> None:
        prompt = [self.draw.randrange(6, 1536) for _ in range(64)]
        request = pb.GenerateRequest(
            token_ids={"ids": prompt},  # type: ignore[arg-type]
            sampling={"temperature": 0.0},  # type: ignore[arg-type]
            stopping={"max_tokens": max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
        )
        async for event in calls.generate(self.cluster.frontends[0].address, request, 30.0):
            if event.HasField("accepted"):
                route = event.accepted.route
                stream.request_id = event.accepted.request_id
                stream.workers = (route.prefill_worker_id, route.decode_worker_id)
            elif event.HasField("chunk"):
                stream.times_s.append(time.time())
            else:
                timings = event.finish.timings
                stream.attempt = event.finish.route.attempt
                took = timings.prefill_end_time.ToNanoseconds() - timings.prefill_start_time.ToNanoseconds()
                stream.prefill_s = took / 1e9

    async def whole(self) -> None:
        """Wait until all workers run, hold no pages, and none is avoided for an earlier failure."""
        self.cluster.release()
        await self.cluster.restore(self.views)
        await self.cluster.assert_idle(10.0)
        await asyncio.sleep(1.1)

    async def broken_decode(self, number: int, *, stops: bool) -> None:
        """Fail a decode worker in mid-stream; measures from the last token before to the first one after."""
        victim = self.cluster.processes[f"decode-{number % 2}"]
        async with self.streams(STREAM_TOKENS) as streams, contextlib.AsyncExitStack() as stack:
            running = lambda: min(len(stream.times_s) for stream in streams)  # noqa: E731
            await assert_eventually(running, lambda count: count >= 10, within_s=20, what="tokens of all")
            held = [stream for stream in streams if victim.name in stream.workers]
            struck_s = time.time()
            if stops:
                await stack.enter_async_context(frozen(victim.pid))
                ended = lambda: all(stream.attempt for stream in held)  # noqa: E731
                await assert_eventually(ended, within_s=20, what="ends of what it held")
            else:
                await kill(victim)
        for stream in held:
            assert stream.attempt > 1, "void: the fault did not affect this stream"
            pause_s = stream.longest_pause_s(struck_s)
            if stops:
                self.note("next_token_after_stop", pause_s)
            else:
                self.note("continuation_gap_after_kill", pause_s - stream.prefill_s)

    async def broken_prefill(self, number: int, *, stops: bool) -> None:
        """A prefill worker breaks while requests wait in it; until their next legs have come to the other one."""
        victim, other = (self.cluster.processes[f"prefill-{(number + more) % 2}"] for more in range(2))
        self.cluster.inject(other.name, PASSED)
        self.cluster.inject(victim.name, {"point": "bootstrap", "kind": "hang"})
        before = len(self.cluster.fired(victim.name)), len(self.cluster.fired(other.name))
        async with self.streams(2), contextlib.AsyncExitStack() as stack:
            mine: Callable[[], list[dict[str, Any]]] = lambda: self.cluster.fired(victim.name)[before[0] :]  # noqa: E731
            theirs: Callable[[], list[dict[str, Any]]] = lambda: self.cluster.fired(other.name)[before[1] :]  # noqa: E731
            come = lambda: len(mine()) + len(theirs())  # noqa: E731
            await assert_eventually(come, lambda count: count >= STREAMS, within_s=20, what="legs of all")
            held = {_request_of(leg["request_id"]) for leg in mine()}
            struck_s = time.time()
            if stops:
                await stack.enter_async_context(frozen(victim.pid))
            else:
                await kill(victim)
            again = lambda: {_request_of(leg["request_id"]): leg["time_s"] for leg in theirs()}  # noqa: E731
            await assert_eventually(again, lambda found: held <= found.keys(), within_s=20, what="next attempts")
            found = again()
        name = "next_attempt_after_stop" if stops else "next_attempt_after_kill"
        for request_id in held:
            self.note(name, found[request_id] - struck_s)


def _request_of(engine_id: str) -> str:
    """The request of an engine's request, which is one attempt of it."""
    return engine_id.rpartition(".")[0] or engine_id


async def cancels(rounds: int, found_ms: dict[str, list[float]]) -> None:
    """A client leaves, in each phase in turn; until neither engine holds anything of its request."""
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    engine = {"chunked_prefill_tokens": 64, "prefix_cache": False}
    flags = {
        role: {"engine-extra": json.dumps({**engine, "control_file": str(logs / f"{role}.rules")})}
        for role in ("prefill", "decode")
    }
    spec = ClusterSpec(model=DEMO_MODEL, log_directory=logs, engine="simulated", role_flags=flags)
    async with LocalCluster(spec) as cluster:
        for number in range(rounds):
            phase = list(HOLDS)[number % len(HOLDS)]
            role, rule = HOLDS[phase]
            await assert_idle(cluster.workers, 10.0)
            before = len(fired(rules(cluster, role)))
            inject(rules(cluster, role), rule)
            left_s = await by_the_client(cluster, phase, before)
            await assert_idle(cluster.workers, 10.0)
            found_ms.setdefault("both_engines_idle_after_cancel", []).append(1e3 * (now_s() - left_s))
            inject(rules(cluster, role))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    found_ms: dict[str, list[float]] = {}
    await cancels(arguments.rounds, found_ms)
    async with leg_cluster(logs, Plan(registries=1, frontends=1), ENGINE) as cluster, cluster.views() as views:
        bench = Bench(cluster, views, arguments.seed)
        bench.found_ms = found_ms
        for number in range(arguments.rounds):
            for stops in (False, True):
                await bench.whole()
                await bench.broken_decode(number, stops=stops)
                await bench.whole()
                await bench.broken_prefill(number, stops=stops)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return {name: report(found_ms[name], goals) for name, goals in GOALS_MS.items()}


def report(times_ms: list[float], goals_ms: dict[str, float]) -> dict[str, Any]:
    """Median and most of what was measured, and whether each is under its goal."""
    measurements = {"median": statistics.median(times_ms), "most": max(times_ms)}
    met = all(measurements[name] < goal_ms for name, goal_ms in goals_ms.items())
    rounded = {f"{name}_ms": round(value) for name, value in measurements.items()}
    return {"requests": len(times_ms), **rounded, "goal_ms": goals_ms, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
