"""A replay in virtual time: the engines of a fleet, its frontends, and the requests of a trace, one policy at a time.

Owns what connects them: arrivals, load reports with their interval, cache events with their delay. Deterministic: all
randomness comes from one seed, and no time but the loop's own is read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from tandem.domain.worker import Start, Worker, WorkerRole
from tandem.engine.simulated.options import Options
from tandem.testing.virtual_time import run_virtually
from tandem_frontend.replay.cache_feed import CacheFeed
from tandem_frontend.replay.change_reports import ChangeReports
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.fleet_file import FleetFile
from tandem_frontend.replay.frontend import ReplayedFrontend, Served
from tandem_frontend.replay.job import Job
from tandem_frontend.replay.prompt_queue import whole_s
from tandem_frontend.replay.role_changes import ReplayedRoles, RoleChange, Steering
from tandem_frontend.replay.trace import ChainHashes, TracedRequest
from tandem_frontend.routing.prefix_index import PrefixIndex

Progress = Callable[[int], None]
"""Called with the number of requests that have ended; may raise to end the replay."""
PROGRESS_STEP = 100


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of one policy."""

    policy: str
    served: tuple[Served, ...]
    """In the order of the trace."""
    engines: tuple[AccountedEngine, ...]
    """With what each has done."""
    end_s: float
    """Virtual time of the last request's end."""
    role_changes: tuple[RoleChange, ...] = ()


def replay(
    fleet: FleetFile,
    options: Options,
    trace: Sequence[TracedRequest],
    policy: str,
    seed: int,
    progress: Progress = lambda count: None,
    steering: Steering | None = None,
) -> Replay:
    """Run a trace against a fleet in virtual time.

    Args:
        fleet: workers and frontends.
        options: of the engines.
        trace: the requests, in the order of arrival.
        policy: one of `POLICIES`.
        seed: of all randomness but the trace's own.
        progress: see `Progress`.
        steering: changes the roles of workers meanwhile; None: the fleet stays as it is.
    """
    return run_virtually(_Simulation(fleet, options, policy, seed, progress, steering).run(trace))


def utilisation_of(options: Options, trace: Sequence[TracedRequest], workers_count: int) -> float:
    """Share of the workers' time that the prompts of a trace would take without a cache."""
    busy_s = sum(whole_s(options, 0, Job(request.prompt_tokens, 0, ())) for request in trace)
    return busy_s / (workers_count * max(trace[-1].arrival_s, 1e-9))


class _Simulation:
    def __init__(
        self, fleet: FleetFile, options: Options, policy: str, seed: int, progress: Progress, steering: Steering | None
    ) -> None:
        self._fleet = fleet
        self._steering = steering
        self._options = options
        self._policy = policy
        self._seed = seed
        self._progress = progress
        self._engines: dict[Start, AccountedEngine] = {}
        self._frontends: list[ReplayedFrontend] = []
        self._indexes: list[PrefixIndex] = []
        self._left = 0

    async def run(self, trace: Sequence[TracedRequest]) -> Replay:
        workers = self._fleet.workers()
        # The indexes are filled below: the frontends follow the engines' caches, and their oracle sees the engines.
        self._engines.update((worker.start, self._engine(worker)) for worker in workers)
        self._frontends = [self._frontend(number, workers) for number in range(self._fleet.frontend.count)]
        self._indexes += [frontend.caches.index for frontend in self._frontends]
        self._left = len(trace)
        self._report_loads()
        roles = ReplayedRoles(self._fleet, workers, self._engines, self._frontends, self._add)
        steering = asyncio.create_task(self._steering.run(roles)) if self._steering else None
        tasks = await self._feed(trace)
        served = tuple(await asyncio.gather(*tasks))
        end_s = max(one.end_s for one in served)
        if steering is not None:
            if steering.done():
                steering.result()
            steering.cancel()
        return Replay(self._policy, served, tuple(self._engines.values()), end_s, tuple(roles.done))

    def _add(self, worker: Worker) -> None:
        """A worker serves in another role, as a new start."""
        self._engines[worker.start] = engine = self._engine(worker)
        self._report_changes(engine)
        for frontend in self._frontends:
            frontend.caches.add(worker)
            self._report_load(engine, frontend, 0.0)

    def _engine(self, worker: Worker) -> AccountedEngine:
        feed = CacheFeed(worker.start, self._indexes, self._fleet.frontend.event_delay_s)
        return AccountedEngine(worker, self._options, self._rng(worker.worker_id).getrandbits(32), feed)

    def _frontend(self, number: int, workers: tuple[Worker, ...]) -> ReplayedFrontend:
        rng = self._rng(f"frontend {number}")
        return ReplayedFrontend(number, self._fleet.frontend, workers, self._engines, self._policy, rng)

    def _rng(self, name: str) -> random.Random:
        """A generator of its own for each part, so that one part's draws do not move another's."""
        return random.Random(f"{name} {self._seed}")  # noqa: S311 -- repeatable, no secret

    async def _feed(self, trace: Sequence[TracedRequest]) -> list[asyncio.Task[Served]]:
        loop, chains = asyncio.get_running_loop(), ChainHashes()
        begin_s = loop.time()
        block_tokens = self._fleet.block_tokens
        tasks: list[asyncio.Task[Served]] = []
        ended = count(1)

        def note_end(_: asyncio.Task[Served]) -> None:
            self._left -= 1
            done = next(ended)
            if done % PROGRESS_STEP == 0 or not self._left:
                self._progress(done)

        for request in trace:
            delay_s = begin_s + request.arrival_s - loop.time()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            hashes = chains.of(request.block_ids[: request.prompt_tokens // block_tokens])
            frontend = self._frontends[request.number % len(self._frontends)]
            task = asyncio.create_task(frontend.serve(request, hashes))
            task.add_done_callback(note_end)
            tasks.append(task)
        return tasks

    def _report_loads(self) -> None:
        """Begin the reports of each worker to each frontend; no two at the same moment."""
        rng = self._rng("load reports")
        for engine in self._engines.values():
            self._report_changes(engine)
            for frontend in self._frontends:
                self._report_load(engine, frontend, rng.random() * self._fleet.frontend.load_interval_s)

    def _report_changes(self, engine: AccountedEngine) -> None:
        """Report the unfinished prompts of a worker when they change, as workers do."""
        if engine.worker.role is not WorkerRole.DECODE:
            engine.on_change = ChangeReports(engine, self._frontends, self._fleet.frontend).note_change

    def _report_load(self, engine: AccountedEngine, frontend: ReplayedFrontend, after_s: float) -> None:
        def report() -> None:
            if engine.has_left:
                return
            frontend.note_load(engine.worker.start, engine.load())
            if self._left:
                loop.call_later(self._fleet.frontend.load_interval_s, report)

        loop = asyncio.get_running_loop()
        loop.call_later(after_s, report)
