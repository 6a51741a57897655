"""CPU time of worker selection in a frontend, by number of workers and policy: `python -m benchmarks.routing`

First all policies, with loads that differ and a prefix that every fourth worker has cached: a selection, all that a
request costs routing from its selection to its end, a load report and a view change. Then selection at random by kind
of fleet, one after another in one process: first attempts, retries, and first attempts each after a change of one
worker's marks. Then the cost of a view change, of admission's capacity check per request, and memory. `--every-pair`
also compares all pairs per selection, as frontends did before there were pools. Measures the thread's CPU time. Other
programs on the machine lengthen it too, because they share its caches and its clock: `cost` is the least of five times
of the same selection, which is what the selection itself takes. `--policies` stops after the first table.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import math
import random
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.circuit_breaker import INTERVAL_S, STRIKES_MAX, CircuitBreakers
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import PolicyName, RoutingRequest
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_costs import SentRequest, WorkerCosts

from tandem.clock import ManualClock
from tandem.domain.worker import (
    LEG_CONTRACT,
    Capabilities,
    EngineLoad,
    Start,
    Worker,
    WorkerRole,
    WorkerState,
    incompatible_field,
)

SIZES = (8, 64, 512, 1_000)
CLASSES = 50
CHOICES = 20_000
WARM = 200
TRIES = 5
"""Of the same selection: what it costs without what other programs add."""
PROMPT_TOKENS = 200
REQUEST = RoutingRequest(PROMPT_TOKENS)
POLICY_SIZES = (64, 512, 1_000)
UNHEALTHY_SHARE, FAILING_SHARE = 0.10, 0.05
CAPABILITIES = Capabilities(
    engine="sglang",
    engine_version="0.5.23",
    model="m",
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    context_tokens_max=32_768,
    kv_capacity_tokens=400_000,
    running_requests_max=256,
    vocabulary_size=128_000,
    eos_token_ids=(2,),
    page_size_tokens=64,
    kv_dtype="bfloat16",
    kv_layout="mha:32x8x128",
    kv_bytes_per_token=131_072,
    transfer_backend="nixl",
)


@dataclass(frozen=True, slots=True)
class Fleet:
    """A kind of fleet."""

    name: str
    classes: int = 1
    """That do not fit together; each has workers of both roles."""
    contexts: int = 1
    """Different ones, as where engines have different amounts of memory."""
    is_unwell: bool = False


FLEETS = (
    Fleet("all alike"),
    Fleet("10 % unhealthy, 5 % failing", is_unwell=True),
    Fleet(f"{CLASSES} classes", CLASSES),
    Fleet(f"{CLASSES} classes, unwell, own contexts", CLASSES, 500, is_unwell=True),
)


def workers_of(size: int, fleet: Fleet) -> tuple[Worker, ...]:
    """Half of them prefill, half decode."""
    return tuple(_worker(number, fleet) for number in range(size))


def _worker(number: int, fleet: Fleet) -> Worker:
    pair, role = number // 2, (WorkerRole.PREFILL, WorkerRole.DECODE)[number % 2]
    context_tokens_max = CAPABILITIES.context_tokens_max + pair % fleet.contexts
    version = f"0.5.{pair % fleet.classes}"
    return Worker(
        worker_id=f"{role.value}-{pair:04}",
        epoch=1_700_000_000_000 + number,
        role=role,
        address=f"10.0.{number // 250}.{number % 250}:30000",
        capabilities=replace(CAPABILITIES, engine_version=version, context_tokens_max=context_tokens_max),
        leg_contract=LEG_CONTRACT,
    )


class Router:
    """The parts that a choice asks, over one fleet."""

    def __init__(
        self, workers: tuple[Worker, ...], *, is_unwell: bool = False, policy: PolicyName = PolicyName.RANDOM
    ) -> None:
        self.workers = workers
        self.unhealthy = frozenset[Start]()
        self._clock = ManualClock(100.0)
        self.breakers = CircuitBreakers(self._clock, random.Random(1), lambda: self.unhealthy)
        self.refusals = RecentRefusals(self._clock)
        model = ServedModel("m", cast("Any", SimpleNamespace(digest=CAPABILITIES.tokenizer_digest)), {})
        self.backlog = PrefillBacklog("m", math.inf)
        self.costs = WorkerCosts(self.backlog)
        rng = random.SystemRandom()
        chosen = make_policy(policy, self.costs, self, rng)
        self.routes = Routes(
            model, lambda: self.workers, lambda: self.unhealthy, self.refusals, self.breakers, rng, chosen, self.costs
        )
        self.follow(workers)
        if is_unwell:
            self._make_unwell()

    @property
    def is_live(self) -> bool:
        """See `CachedPrefixes`."""
        return True

    def match(self, prompt: Mapping[Start, int]) -> Mapping[Start, int]:
        """See `CachedPrefixes`; the prompt is its own answer, because the index is measured elsewhere."""
        return prompt

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Another view, as the frontend takes it."""
        self.workers = workers
        self.breakers.follow(workers)
        self.routes.follow(workers)

    def _make_unwell(self) -> None:
        shuffled = random.Random(2).sample(self.workers, len(self.workers))
        unhealthy = max(1, round(len(shuffled) * UNHEALTHY_SHARE))
        failing = shuffled[unhealthy : unhealthy + max(1, round(len(shuffled) * FAILING_SHARE))]
        # One after the other: what strikes many at one moment is the fault of none.
        for bad in failing:
            for _ in range(STRIKES_MAX):
                self.breakers.failed(bad, self.breakers.sent([bad]))
                self._clock.advance(1.1 * INTERVAL_S)
                self.breakers.ejected()
                for worker in self.workers:
                    if worker not in failing:
                        self.breakers.succeeded(worker, self._clock())
        # Their probes are on the way, so that they stay left out.
        self._clock.advance(20.0)
        self.breakers.sent(failing)
        self.unhealthy = frozenset(worker.start for worker in shuffled[:unhealthy])


def choices(router: Router) -> dict[str, Callable[[], object]]:
    """The kinds of choices that are timed."""
    routes, rng = router.routes, random.Random(3)
    tried = [frozenset(worker.start for worker in routes.first(REQUEST).workers) for _ in range(64)]

    def first() -> object:
        return routes.first(REQUEST)

    def again() -> object:
        starts = tried[rng.randrange(64)]
        return routes.next(REQUEST, starts, starts)

    def changed() -> object:
        known = {worker.start for worker in rng.sample(router.workers, 3)}
        router.unhealthy = base ^ known
        return routes.first(REQUEST)

    base = router.unhealthy
    return {"first": first, "again": again, "changed": changed}


class Requests:
    """Requests at the workers of one fleet, and the loads that these report."""

    def __init__(self, name: PolicyName, size: int) -> None:
        self.workers = workers_of(size, FLEETS[0])
        self.router = Router(self.workers, policy=name)
        self._rng = random.Random(6)
        self._loads = [
            EngineLoad(running_requests=n, waiting_requests=n, waiting_tokens=200 * n, kv_used_tokens=900 * n)
            for n in range(100)
        ]
        # The load of every tenth worker is unknown.
        for number, worker in enumerate(self.workers):
            if number % 10:
                self.router.costs.note(worker.start, self._rng.choice(self._loads))
        self._cached = {worker.start: 128 for worker in self.workers[::4]}
        self._open: deque[tuple[PrefillWork, SentRequest]] = deque()

    def draw(self) -> Callable[[], Route]:
        """The selection of the workers of a request, which may be repeated."""
        session = str(self._rng.randrange(1_000))
        return lambda: self.router.routes.first(RoutingRequest(PROMPT_TOKENS, self._cached, session=session))

    def choose(self) -> Route:
        """Select the workers of a request."""
        return self.draw()()

    def serve(self) -> None:
        """Select the workers of a request and send it; end the oldest one."""
        route = self.choose()
        work = self.router.backlog.reserve(PROMPT_TOKENS)
        work.sent(route.computing.start, route.expected_cached_tokens or 0)
        self._open.append((work, self.router.routes.sent(route, PROMPT_TOKENS)))
        if len(self._open) > 4 * len(self.workers):
            prefill, streaming = self._open.popleft()
            prefill.drop()
            streaming.end()

    def report(self) -> None:
        """A worker reports its load."""
        self.router.costs.note(self._rng.choice(self.workers).start, self._rng.choice(self._loads))


def policy_costs(name: PolicyName, size: int) -> list[tuple[float, float]]:
    """The columns of `print_policies`."""
    requests = Requests(name, size)
    served = microseconds(requests.serve, 5_000)
    workers = requests.workers
    drained = (replace(workers[0], state=WorkerState.DRAINING), *workers[1:])
    views = itertools.cycle((drained, workers))
    changed = microseconds(lambda: requests.router.routes.follow(next(views)), 500)
    chosen, cost = microseconds(requests.choose, 5_000), least_microseconds(requests.draw, 5_000)
    return [chosen, cost, served, microseconds(requests.report, 5_000), changed]


def print_policies() -> None:
    """The table of all policies."""
    print("| workers | policy | selection | its cost | request | load report | view change |")
    print("|---|---|---|---|---|---|---|")
    for size in POLICY_SIZES:
        for name in PolicyName:
            if name is not PolicyName.AUTO:
                cells = " | ".join(map(_cell, policy_costs(name, size)))
                print(f"| {size} | {name.value} | {cells} |", flush=True)
    print()


def every_pair(workers: Sequence[Worker]) -> Callable[[], object]:
    """A choice as it was made before there were pools, as far as pairs are concerned."""

    def choose() -> object:
        prefills = [worker for worker in workers if worker.role is WorkerRole.PREFILL]
        found = []
        for decode in (worker for worker in workers if worker.role is WorkerRole.DECODE):
            fitting = [p for p in prefills if incompatible_field(p.capabilities, decode.capabilities) is None]
            if fitting:
                found.append((decode, fitting))
        decode, fitting = random.choice(found)
        return decode, random.choice(fitting)

    return choose


def microseconds(act: Callable[[], object], count: int = CHOICES) -> tuple[float, float]:
    """Median and 99th percentile."""
    for _ in range(min(WARM, count)):
        act()
    taken = []
    gc.collect()
    for _ in range(count):
        begin_ns = time.thread_time_ns()
        act()
        taken.append(time.thread_time_ns() - begin_ns)
    return statistics.median(taken) / 1e3, statistics.quantiles(taken, n=100)[98] / 1e3


def least_microseconds(draw: Callable[[], Callable[[], object]], count: int) -> tuple[float, float]:
    """Median and 99th percentile over different acts, of the least time of TRIES repetitions of each."""
    for _ in range(min(WARM, count)):
        draw()()
    taken = []
    gc.collect()
    for _ in range(count):
        act, times = draw(), list[int]()
        for _ in range(TRIES):
            begin_ns = time.thread_time_ns()
            act()
            times.append(time.thread_time_ns() - begin_ns)
        taken.append(min(times))
    return statistics.median(taken) / 1e3, statistics.quantiles(taken, n=100)[98] / 1e3


def view_change(size: int) -> tuple[float, float]:
    """One worker begins to drain or serves again: all that the frontend keeps of the view."""
    router, room = Router(workers_of(size, FLEETS[2])), Capacity("m")
    views = []
    for number in range(64):
        workers = list(router.workers)
        at = (number * 7) % size
        workers[at] = replace(workers[at], state=WorkerState.DRAINING)
        views += [tuple(workers), router.workers]
    turns = iter(range(10**9))

    def change() -> None:
        view = views[next(turns) % len(views)]
        router.follow(view)
        room.follow(view)

    return microseconds(change, 2_000)


def capacity(size: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Whether one more request fits, and what a worker's word of its load costs."""
    workers, room, rng = workers_of(size, FLEETS[0]), Capacity("m"), random.Random(4)
    room.follow(workers)
    loads = [EngineLoad(running_requests=n, waiting_requests=0, kv_used_tokens=1_000 * n) for n in range(100)]

    def note() -> None:
        room.note(workers[rng.randrange(size)].start, loads[rng.randrange(100)])

    said = microseconds(note)
    return microseconds(lambda: room.fits(10, 10_000, room.counted(PROMPT_TOKENS, 128))), said


def memory_kib(size: int) -> float:
    """What a frontend keeps of a fleet to choose from it, without the view itself."""
    workers = workers_of(size, FLEETS[-1])
    gc.collect()
    tracemalloc.start()
    router, room = Router(workers), Capacity("m")
    room.follow(workers)
    router.routes.first(REQUEST)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return kept / 1024


def noise() -> tuple[float, float]:
    """A loop of additions that takes about as long as a choice: how far the machine itself spreads times."""

    def loop() -> None:
        total = 0
        for number in range(1_500):
            total += number

    return microseconds(loop)


def _cell(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1f} / {pair[1]:.1f}"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Times of a choice of workers, median / 99th percentile, in us.")
    parser.add_argument("--every-pair", action="store_true", help="also compare every pair for each selection")
    parser.add_argument("--policies", action="store_true", help="only the table of all policies")
    given = parser.parse_args()
    every = given.every_pair
    logging.getLogger("tandem_frontend").setLevel(logging.ERROR)
    print_policies()
    if given.policies:
        print(f"A loop of additions, which always does the same: {_cell(noise())}")
        return
    print(
        "| workers | fleet | first attempt | another attempt | first after a change of marks |\n|---|---|---|---|---|"
    )
    for size in SIZES:
        for fleet in FLEETS:
            if size >= 4 * fleet.classes:
                router = Router(workers_of(size, fleet), is_unwell=fleet.is_unwell)
                cells = " | ".join(_cell(microseconds(act)) for act in choices(router).values())
                print(f"| {size} | {fleet.name} | {cells} |")
    print("\n| workers | one worker of the view changes | capacity check | load report | KiB | every pair |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        fits, report = capacity(size)
        pairs = _cell(microseconds(every_pair(workers_of(size, FLEETS[0])), 40)) if every else "-"
        cells = " | ".join((_cell(view_change(size)), _cell(fits), _cell(report), f"{memory_kib(size):.0f}", pairs))
        print(f"| {size} | {cells} |")
    print(f"\nA loop of additions, which always does the same: {_cell(noise())}")


if __name__ == "__main__":
    main()
