"""What a routing policy is worth, on virtual time: `python -m benchmarks.routing_spread TRACE.jsonl [--frontends 4]`

Prefill workers of fixed speed that take prompts in their order, each with a prefix cache of LRU blocks; decode workers
that hold each request for its output. Every frontend has its own routing code, the real one, and sees load reports once
a second. A quick measure of choices alone: no admission, no transfers, no pages. Prints mean TTFT, hit rate, and the
least and most work of a worker by the mean. Without a trace: single-turn prompts, half of them with a shared beginning.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.timestamp_pb2 import Timestamp
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import PolicyName, RoutingRequest
from tandem_frontend.routing.router import Routes
from tandem_frontend.routing.worker_costs import WorkerCosts

from benchmarks.routing import CAPABILITIES, FLEETS, workers_of
from tandem.api.types.v1 import leg_pb2
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole

BLOCK_TOKENS = 512
REPORT_S = 1.0
TOKEN_S = 0.02
OVERHEAD_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a trace."""

    time_s: float
    tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Machine:
    """One worker: a queue, a prefix cache, and what it has done."""

    worker: Worker
    tokens_per_s: float
    blocks_max: float
    queue: list[Any] = field(default_factory=list)
    is_busy: bool = False
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    requests: int = 0
    kv_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0

    def matched(self, prompt: Prompt) -> int:
        """Leading tokens in its cache."""
        count = 0
        for block in prompt.blocks:
            if block not in self.cache:
                break
            count += 1
        return min(count * BLOCK_TOKENS, prompt.tokens)

    def store(self, prompt: Prompt) -> None:
        """Keep its blocks, and drop the least recently used ones."""
        for block in reversed(prompt.blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.blocks_max:
            self.cache.popitem(last=False)

    def load(self) -> EngineLoad:
        """A load report."""
        waiting = sum(item[0].tokens for item in self.queue)
        return EngineLoad(
            running_requests=self.requests,
            waiting_requests=len(self.queue),
            waiting_tokens=waiting,
            kv_used_tokens=self.kv_tokens,
        )


class Simulation:
    """One run."""

    def __init__(
        self,
        policy: PolicyName,
        size: int = 16,
        *,
        frontends: int = 1,
        tokens_per_s: float,
        blocks_max: float = math.inf,
        seed: int = 1,
    ) -> None:
        """`size` workers, half of them prefill; `blocks_max` is the size of a prefix cache."""
        self.rng = random.Random(seed)
        self.machines = {
            worker.start: Machine(worker, tokens_per_s, blocks_max)
            for worker in map(_large, workers_of(size, FLEETS[0]))
        }
        self.now_s = 0.0
        self.ttfts_s: list[float] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._policy = policy
        self._frontends = [self._frontend(number) for number in range(frontends)]

    @property
    def is_live(self) -> bool:
        """See `CachedPrefixes`."""
        return True

    def match(self, prompt: Prompt) -> Mapping[Start, int]:
        """See `CachedPrefixes`."""
        found = {m.worker.start: m.matched(prompt) for m in self.machines.values() if _computes(m)}
        return {start: tokens for start, tokens in found.items() if tokens}

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Until every prompt has its first token."""
        for prompt in prompts:
            self._at(prompt.time_s, lambda prompt=prompt: self._arrive(prompt))  # type: ignore[misc]
        last_s = prompts[-1].time_s
        for at, frontend in enumerate(self._frontends):
            self._report(frontend, last_s, first_s=REPORT_S * (at + 1) / len(self._frontends))
        while self._events:
            self.now_s, _, act = heapq.heappop(self._events)
            act()

    def shares(self, role: WorkerRole = WorkerRole.PREFILL) -> tuple[float, float]:
        """Least and most work of a worker, by the mean: computed tokens, or requests of decode workers."""
        done = [m.computed_tokens for m in self.machines.values() if m.worker.role is role]
        mean = sum(done) / len(done)
        return min(done) / mean, max(done) / mean

    def hit_rate(self) -> float:
        """Cached by all prompt tokens."""
        cached = sum(m.cached_tokens for m in self.machines.values())
        computed = sum(m.computed_tokens for m in self.machines.values() if _computes(m))
        return cached / (cached + computed)

    def _frontend(self, number: int) -> tuple[Routes, WorkerCosts, PrefillBacklog]:
        workers = tuple(machine.worker for machine in self.machines.values())
        backlog = PrefillBacklog("m", math.inf)
        costs, rng = WorkerCosts(backlog, lambda: self.now_s), random.Random(self.rng.random())
        policy = make_policy(self._policy, costs, self, rng)
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        none = cast("Any", SimpleNamespace(recent=frozenset, ejected=frozenset))
        routes = Routes(model, lambda: workers, frozenset, none, none, rng, policy, costs)
        routes.follow(workers)
        return routes, costs, backlog

    def _arrive(self, prompt: Prompt) -> None:
        routes, _, backlog = self.rng.choice(self._frontends)
        route = routes.first(RoutingRequest(prompt.tokens, prompt))
        assert route.prefill is not None
        work = backlog.reserve(prompt.tokens)
        work.sent(route.prefill.start, route.expected_cached_tokens or 0)
        sent = routes.sent(route, prompt.tokens)
        prefill, decode = self.machines[route.prefill.start], self.machines[route.decode.start]
        decode.requests += 1
        decode.kv_tokens += prompt.tokens
        decode.computed_tokens += 1

        def computed(finish: leg_pb2.LegFinish) -> None:
            work.computed(finish)
            self.ttfts_s.append(self.now_s - prompt.time_s)
            self._at(self.now_s + prompt.output_tokens * TOKEN_S, ended)

        def ended() -> None:
            decode.requests -= 1
            decode.kv_tokens -= prompt.tokens
            sent.end()

        prefill.queue.append((prompt, computed))
        self._next(prefill)

    def _next(self, machine: Machine) -> None:
        if machine.is_busy or not machine.queue:
            return
        machine.is_busy = True
        prompt, computed = machine.queue.pop(0)
        cached, begin_s = machine.matched(prompt), self.now_s
        uncached = prompt.tokens - cached
        machine.cached_tokens += cached
        machine.computed_tokens += uncached

        def done() -> None:
            machine.is_busy = False
            machine.store(prompt)
            finish = leg_pb2.LegFinish()
            finish.usage.cached_tokens = cached
            finish.timings.prefill_start_time.CopyFrom(_time(begin_s))
            finish.timings.prefill_end_time.CopyFrom(_time(self.now_s))
            self._next(machine)
            computed(finish)

        self._at(self.now_s + (uncached + OVERHEAD_TOKENS) / machine.tokens_per_s, done)

    def _report(self, frontend: tuple[Routes, WorkerCosts, PrefillBacklog], last_s: float, first_s: float) -> None:
        def report() -> None:
            for start, machine in self.machines.items():
                frontend[1].note(start, machine.load())
            if self.now_s < last_s:
                self._at(self.now_s + REPORT_S, report)

        self._at(first_s, report)

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, act))


def _large(worker: Worker) -> Worker:
    """The same worker with a context for every prompt of the traces."""
    capabilities = replace(worker.capabilities, context_tokens_max=2**20, kv_capacity_tokens=2**21)
    return replace(worker, capabilities=capabilities)


def _computes(machine: Machine) -> bool:
    return machine.worker.role is not WorkerRole.DECODE


def _time(time_s: float) -> Timestamp:
    return Timestamp(seconds=int(time_s), nanos=int(time_s % 1 * 1e9))


def read(path: Path) -> list[Prompt]:
    """A trace in Mooncake's format; requests of one moment are spread until the next one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Prompt(row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in rows
    ]


def single_turn(count: int = 8_000, seed: int = 5) -> list[Prompt]:
    """Prompts that never come again, half of them with one of four shared beginnings of 2,048 tokens."""
    rng = random.Random(seed)

    def made() -> Iterator[Prompt]:
        time_s, block = 0.0, 100
        for _ in range(count):
            time_s += rng.expovariate(4.0)
            tokens = int(rng.lognormvariate(8.0, 0.6))
            shared = tuple(range(4 * (first := rng.randrange(4)), 4 * first + 4)) if rng.random() < 0.5 else ()
            own = tuple(range(block, block + max(0, tokens - BLOCK_TOKENS * len(shared)) // BLOCK_TOKENS))
            block += len(own) + 1
            yield Prompt(time_s, max(tokens, BLOCK_TOKENS * len(shared) + 1), 100, shared + own)

    return list(made())


def main() -> None:
    """Print one row for each policy."""
    parser = argparse.ArgumentParser(description="What a routing policy is worth, on virtual time.")
    parser.add_argument("trace", nargs="?", type=Path, help="in Mooncake's format; default: single-turn prompts")
    parser.add_argument("--frontends", type=int, default=1, help="that share the requests")
    parser.add_argument("--blocks", type=float, default=2_000, help="of 512 tokens, in each prefix cache; inf: all")
    parser.add_argument("--load", type=float, default=0.7, help="share of what the workers can without caches")
    parser.add_argument("--policy", action="append", choices=[name.value for name in PolicyName], help="repeatable")
    given = parser.parse_args()
    prompts = single_turn() if given.trace is None else read(given.trace)
    rate = sum(prompt.tokens for prompt in prompts) / prompts[-1].time_s / 8 / given.load
    print("| policy | mean TTFT, s | hit rate | prefill least / most | decode least / most |\n|---|---|---|---|---|")
    for name in given.policy or [name.value for name in PolicyName if name is not PolicyName.AUTO]:
        simulation = Simulation(PolicyName(name), frontends=given.frontends, tokens_per_s=rate, blocks_max=given.blocks)
        simulation.run(prompts)
        mean_s = sum(simulation.ttfts_s) / len(simulation.ttfts_s)
        cells = [f"{mean_s:.2f}", f"{simulation.hit_rate():.3f}"]
        cells += [
            "{:.2f} / {:.2f}".format(*simulation.shares(role)) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
