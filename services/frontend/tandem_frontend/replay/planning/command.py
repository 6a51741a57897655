"""The command: reads a load and a fleet, searches, and reports.

Owns the order of these and the progress on a terminal; the options are `tandem.cli.plan`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.domain.recorded_load import RecordedCluster
from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.options import Options
from tandem.errors import ConfigError
from tandem_frontend.replay.fleet_file import FleetFile, read_fleet
from tandem_frontend.replay.planning.candidate import Candidate, judged
from tandem_frontend.replay.planning.counts import ROLES, Counts
from tandem_frontend.replay.planning.estimate import estimate
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.planning.recorded import fleet_of, seen, shape_of, speeds_in_words, trace_of
from tandem_frontend.replay.planning.report import load_of, print_plan, write_json
from tandem_frontend.replay.planning.search import Outcome, Search, Shape
from tandem_frontend.replay.planning.speeds import check_speeds, measured
from tandem_frontend.replay.routing import check_policies
from tandem_frontend.replay.simulation import replay
from tandem_frontend.replay.trace import TracedRequest, read_trace, scaled, spread

REPLAYS_MAX = 40
REPLAYS_LIMIT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the command was asked for."""

    ttft_s: float
    itl_s: float
    percentile: float
    workers_max: int = 64
    replays_max: int = REPLAYS_MAX
    shape: str = Shape.ANY.value
    policy: str = "auto"
    seed: int = 0
    load: float = 1.0
    """Factor on the rate of arrivals."""
    json: Path | None = None

    def goals(self) -> Goals:
        """Check the options.

        Raises:
            ConfigError: names the option.
        """
        check_policies((self.policy,))
        if self.shape not in [*Shape]:
            raise ConfigError("shape", f"must be one of {', '.join(Shape)}, not {self.shape!r}")
        if not 1 <= self.replays_max <= REPLAYS_LIMIT:
            raise ConfigError("replays_max", f"must be 1 to {REPLAYS_LIMIT}, not {self.replays_max}")
        if not 0 < self.load <= 1000:
            raise ConfigError("load", f"must be above 0, at most 1000, not {self.load:g}")
        return Goals(ttft_s=self.ttft_s, itl_s=self.itl_s, percentile=self.percentile, workers_max=self.workers_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A load, and the workers that are to serve it."""

    name: str
    """Where the load comes from."""
    fleet: FleetFile
    """A worker of each role; its counts are the present ones."""
    trace: list[TracedRequest]
    shape: Shape


def run(request: PlanRequest, trace_file: Path, fleet_file: Path, console: Console, status: Console) -> int:
    """Plan for a trace and a fleet file. Returns the exit status: 1 if no fleet reaches the goals.

    Args:
        request: the options.
        trace_file: the load.
        fleet_file: the workers.
        console: gets the tables.
        status: gets the progress, where it is a terminal.

    Raises:
        ConfigError: names the option, the field of the fleet, or the line of the trace.
    """
    goals = request.goals()
    fleet = read_fleet(fleet_file)
    goals.check_engine(fleet.options())
    trace = scaled(read_trace(trace_file, fleet.block_tokens), request.load)
    outcome = plan(
        Subject(name=trace_file.name, fleet=fleet, trace=trace, shape=Shape(request.shape)), request, console, status
    )
    return 0 if outcome.best else 1


def run_recorded(
    request: PlanRequest, cluster: RecordedCluster, fleet_file: Path | None, console: Console, status: Console
) -> dict[WorkerRole, int] | None:
    """Plan for what a cluster has seen. Returns the workers of each role; None: no fleet reaches the goals.

    Args:
        request: the options.
        cluster: its workers and last requests.
        fleet_file: its [engine] and [frontend] are used; None: speeds are measured from the requests.
        console: gets the tables.
        status: gets the progress, where it is a terminal.

    Raises:
        ConfigError: names the option.
        StartError: the requests do not show what a plan needs.
    """
    goals = request.goals()
    lines = list(seen(cluster, goals))
    given = None if fleet_file is None else read_fleet(fleet_file)
    if given is None:
        speeds = measured(cluster.requests)
        check_speeds(speeds)
        lines.append(speeds_in_words(speeds))
        shape, note = shape_of(Shape(request.shape), speeds)
        fleet = fleet_of(cluster, speeds.options(), {})
    else:
        shape, note = Shape(request.shape), ""
        fleet = fleet_of(cluster, given.engine, given.frontend.model_dump(exclude_unset=True))
    goals.check_engine(fleet.options())
    trace = scaled(trace_of(cluster.requests, fleet.block_tokens), request.load)
    for line in (*lines, *([note] if note else ())):
        console.print(line, highlight=False, soft_wrap=True)
    outcome = plan(
        Subject(name=f"cluster {cluster.model}", fleet=fleet, trace=trace, shape=shape), request, console, status
    )
    return None if outcome.best is None else {WorkerRole(role): getattr(outcome.best.counts, role) for role in ROLES}


def plan(subject: Subject, request: PlanRequest, console: Console, status: Console) -> Outcome:
    """Search and report.

    Raises:
        ConfigError: names the option.
    """
    goals, options = request.goals(), subject.fleet.options()
    goals.check_engine(options)
    console.print(load_of(subject.trace), highlight=False, soft_wrap=True)
    outcome = searched(subject, options, goals, request, status)
    print_plan(console, outcome, goals)
    if request.json is not None:
        write_json(request.json, outcome, _settings(subject, request, options))
    return outcome


def searched(subject: Subject, options: Options, goals: Goals, request: PlanRequest, status: Console) -> Outcome:
    """Search by replays of the candidates."""
    present = Counts.of(subject.fleet)
    with _progress(status) as progress:

        def judge(counts: Counts, seed: int) -> Candidate:
            task = progress.add_task(f"{counts}, seed {seed}", total=len(subject.trace))
            outcome = replay(
                *(counts.fleet(subject.fleet), options, spread(subject.trace, seed), request.policy, seed),
                progress=lambda count: progress.update(task, completed=count),
            )
            progress.update(task, visible=False)
            return judged(counts, seed, outcome, goals)

        search = Search(
            judge,
            estimate(subject.fleet, options, subject.trace, goals),
            subject.shape,
            seed=request.seed,
            workers_max=request.workers_max,
            replays_max=request.replays_max,
        )
        return search.run(present)


def _progress(status: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=status, transient=True, disable=not status.is_terminal)


def _settings(subject: Subject, request: PlanRequest, options: Options) -> dict[str, Any]:
    engine = {name: value for name, value in asdict(options).items() if isinstance(value, int | float | str)}
    asked = {name: value for name, value in asdict(request).items() if name != "json"}
    return {**asked, "trace": subject.name, "fleet": subject.fleet.model_dump(), "engine": engine}
